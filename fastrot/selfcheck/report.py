"""What a bundle says: verdict.json, the config of the switches that pay, and one page."""

import json
from pathlib import Path
from typing import Any

from fastrot.files import write_text
from fastrot.selfcheck import verdict
from fastrot.selfcheck.parts import PARTS
from fastrot.templates import template

RECORD = 7137  # trained views/s of one H100: MLPerf, MXNet with fused convolutions


def write(bundle: Path) -> dict[str, Any]:
    """Write verdict.json, report.html and, where the step was measured, in1k_fast_NAME.yaml; the verdict."""
    parts = _parts(bundle)
    environment = json.loads((bundle / "environment.json").read_text())
    device = environment["gpus"][0] if environment["gpus"] else "CPU (a rehearsal: no figure counts)"
    said = {"device": device, **_verdict(parts)}
    name = f"in1k_fast_{name_of(environment['gpus'])}"
    if said["switches"] is not None:
        said["config"] = f"{name}.yaml"
        _write_config(bundle, said, device, said["images"])
    if several := said["several"]:
        several["config"] = f"{name}_{several['ranks']}.yaml"
        _write_config(bundle, several, f"{several['ranks']} x {device}", several["images"])
    write_text(bundle / "verdict.json", json.dumps(said, indent=1))
    write_text(bundle / "report.html", page(said, parts, environment))
    return said


def _write_config(bundle: Path, chosen: dict[str, Any], device: str, images: int) -> None:
    arm = verdict.Arm(chosen["arm"], chosen["times_base"], chosen["times_base"], True)
    write_text(bundle / chosen["config"], verdict.fast_config(arm, device, images))


def name_of(gpus: list[str]) -> str:
    """A card's name for files: nvidia-h100-80gb-hbm3; cpu without one."""
    return "-".join("".join(c if c.isalnum() else " " for c in gpus[0].lower()).split()) if gpus else "cpu"


def _parts(bundle: Path) -> list[dict[str, Any]]:
    """The parts that the bundle holds, in their order; others after them."""
    order = [part.name for part in PARTS]
    found = [json.loads(file.read_text()) for file in bundle.glob("*.json")]
    parts = [one for one in found if "part" in one]
    return sorted(parts, key=lambda one: order.index(one["part"]) if one["part"] in order else len(order))


def _verdict(parts: list[dict[str, Any]]) -> dict[str, Any]:
    raw = {one["part"]: one["raw"] for one in parts}
    arms = verdict.arms_of(raw.get("step", {}))
    chosen = verdict.choose(arms) if arms else None
    line = raw["step"]["switches"].get(chosen.name, {}) if chosen else {}
    return {
        "parts": {one["part"]: one["status"] for one in parts},
        "failed": [{"part": one["part"], "why": why, "open": one["opens"]} for one in parts for why in one["failures"]],
        "skipped": sum(len(one["skipped"]) for one in parts),
        "arm": chosen and chosen.name,
        "switches": chosen and verdict.engine_keys(chosen),
        "images": raw.get("step", {}).get("images", 128),
        "times_base": chosen and chosen.speed,
        "times_plain": line.get("times_plain"),
        "views_per_s": line.get("views_per_s"),
        "record_views_per_s": RECORD,
        "several": _several(raw.get("ranks", {})),
        "wait_share": raw.get("end_to_end", {}).get("wait_share"),
    }


def _several(raw: dict[str, Any]) -> dict[str, Any] | None:
    """What pays over all GPUs, where there are several."""
    if not (found := verdict.over_ranks(raw)):
        return None
    result, arm = found
    line = result["switches"][arm.name]
    return {
        "ranks": result["ranks"],
        "images": result["images"],
        "arm": arm.name,
        "times_base": arm.speed,
        "views_per_s": line["views_per_s"],
    }


def page(said: dict[str, Any], parts: list[dict[str, Any]], environment: dict[str, Any]) -> str:
    """HTML that needs nothing else."""
    raw: dict[str, dict[str, Any]] = {one["part"]: one["raw"] for one in parts}
    step = raw.get("step", {})
    arms = sorted((step.get("plain", {}) | step.get("switches", {})).items(), key=lambda arm: -arm[1]["times_base"])
    most = max([line["times_base"] for _, line in arms], default=1.0)
    return template("fastrot.selfcheck", "template.html").render(
        said=said,
        parts=parts,
        environment=environment,
        arms=arms,
        most=most,
        missing=step.get("missing", {}),
        kernels=raw.get("kernels", {}).get("rows", []),
    )
