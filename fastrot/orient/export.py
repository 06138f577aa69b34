"""`fastrot export --to onnx|pt2`: a network as a program that needs no fastrot, and a model card beside it."""

import importlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastrot import terminal
from fastrot.config import load
from fastrot.errors import UserError
from fastrot.files import replacing, sha256_of, write_text
from fastrot.models.backbone import Origin, load_backbone
from fastrot.models.export import card
from fastrot.orient.network import SHOWS, TRUST, RunNetwork, Shows, Trust, shows_of

OPSET = 18  # of ONNX
_SIDE = 224  # of the input, where nobody knows what the weights were trained at
_CLASSES = "class t: turned by t quarter turns counter-clockwise; 90 * t degrees clockwise put the image upright"

_USE = {
    "onnx": """\
session = onnxruntime.InferenceSession("{file}", providers=["CPUExecutionProvider"])
({output},) = session.run(None, {{"views": views}})  # float32 [n, 3, {side}, {side}]
session.get_modelmeta().custom_metadata_map  # how images are made ready; what was calibrated""",
    "pt2": """\
facts = {{"facts.json": ""}}  # how images are made ready; what was calibrated
program = torch.export.load("{file}", extra_files=facts)
{output} = program.module()(views)  # float32 [n, 3, {side}, {side}]""",
}


def export(checkpoint: str, to: str, out: str, head: bool) -> dict[str, Any]:
    """Write the network of a checkpoint to `out` (.onnx or .pt2) and a card to the same name, .md.

    to    onnx or pt2.  head: [n, 4] logits of the turns, of a run of fastrot train; else [n, D], the average of its last
          maps, of any checkpoint. Returns what --json prints. Raises UserError.
    """
    path = Path(out)
    if path.suffix != f".{to}":
        raise UserError(f"--out {out}: expected a name ending in .{to}")
    missing = [name for name in ("onnx", "onnxscript") if to == "onnx" and importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--to onnx: {' and '.join(missing)} not installed; pip install 'fastrot[onnx]'")
    model, origin, shows, trust = _with_head(checkpoint) if head else _backbone(checkpoint)
    output, side = "logits" if head else "features", shows.size if shows else _SIDE
    facts = _facts(origin, shows, trust)
    try:
        with replacing(path) as scratch, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of what it uses itself
            (_write_onnx if to == "onnx" else _write_pt2)(model, side, output, facts, scratch)
        digest = sha256_of(path)
        use = _USE[to].format(file=path.name, output=output, side=side)
        about = _about(to, head, shows, side)
        write_text(path.with_suffix(".md"), card(origin, path.name, digest, about, use, _calibrated(trust)))
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
    rows = [("from", origin.says()), ("input", f"views, float32 [n, 3, {side}, {side}]"), ("output", output)]
    rows += [("opset", str(OPSET))] if to == "onnx" else []
    terminal.table("export", [*rows, ("outputs", f"{path} (sha256 {digest[:12]}), {path.with_suffix('.md')}")])
    return {"out": out, "card": str(path.with_suffix(".md")), "sha256": digest, "arch": origin.arch, "output": output,
            "size": side, "opset": OPSET if to == "onnx" else None}  # fmt: skip


def _with_head(checkpoint: str) -> tuple[nn.Module, Origin, Shows | None, Trust | None]:
    network = RunNetwork(checkpoint)
    _, origin = load_backbone(str(network.path))
    return network.model.cpu(), origin, network.shows, network.trust


def _backbone(checkpoint: str) -> tuple[nn.Module, Origin, Shows | None, Trust | None]:
    model, origin = load_backbone(checkpoint)
    run = origin.run and Path(origin.run, "config.yaml")
    return model, origin, shows_of(load(str(run), [])[0]) if run else None, None


def _facts(origin: Origin, shows: Shows | None, trust: Trust | None) -> dict[str, str]:
    """What the file says of itself, by key."""
    facts = {"fastrot.arch": origin.arch, "fastrot.backbone": f"sha256 {origin.sha256}"}
    if shows is not None:
        facts[SHOWS] = shows.to_json()
    if trust is not None:
        facts |= {TRUST: trust.to_json(), "fastrot.classes": _CLASSES}
    return facts


def _program(model: nn.Module, side: int) -> torch.export.ExportedProgram:
    """Of any number of views."""
    views = torch.zeros(2, 3, side, side)
    return torch.export.export(model, (views,), dynamic_shapes=({0: torch.export.Dim("n")},))


def _write_onnx(model: nn.Module, side: int, output: str, facts: dict[str, str], file: Path) -> None:
    made = torch.onnx.export(
        _program(model, side),
        input_names=["views"],
        output_names=[output],
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    made.model.metadata_props.update(facts)
    made.save(file, external_data=False)


def _write_pt2(model: nn.Module, side: int, output: str, facts: dict[str, str], file: Path) -> None:
    with file.open("wb") as target:
        torch.export.save(_program(model, side), target, extra_files={"facts.json": json.dumps(facts)})


def _about(to: str, head: bool, shows: Shows | None, side: int) -> str:
    form = f"ONNX of opset {OPSET}" if to == "onnx" else "a program of torch.export"
    what = (
        f"logits [n, 4] of the turns of an image, {_CLASSES}; fastrot orient shows all four turns of it and joins them"
        if head
        else "the average of the last maps, [n, D]"
    )
    return f"{form[0].upper()}{form[1:]}, for any number of views: `views`, RGB, float32 [n, 3, {side}, {side}] -> {what}. {_ready(shows)}"


def _ready(shows: Shows | None) -> str:
    if shows is None:
        return "Which size and normalisation the weights are used to is not known."
    whole = (
        "the whole image resized to it" if shows.fit == "squash" else f"short side resized to {shows.resize}, centre"
    )
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (shows.mean, shows.std))
    return f"An image is made ready so: {whole}; in [0, 1], minus ({mean}), over ({std})."


def _calibrated(trust: Trust | None) -> list[str]:
    """What was measured of the answers."""
    if trust is None:
        return []
    lines = ["## Which way is up"]
    if trust.measured is None:
        return [*lines, "Not calibrated: how far its probabilities can be believed was not measured.", ""]
    return [
        *lines,
        f"Answers are the four turns joined; scores are divided by {trust.temperature:.4g} before the softmax, and from "
        f"a probability of {trust.threshold:.4g} on an answer counts.",
        "",
        "| images | accuracy | calibration error before, after | decided | wrong of these | wrong of the surest 50, 80, 90, 95, 99, 100 % |",
        "|---|---|---|---|---|---|",
        *(_row(figures) for figures in trust.measured.values()),
        "",
        "Of the first, each tenth was judged by what the other nine chose.",
        *(
            f"Of {others['pictures']:,} pictures without an up (`{others['source']}`) {_percent(others['answered'])} got an answer."
            for others in (trust.measured["held_out"].get("without_up"),)
            if others
        ),
        "",
    ]


def _row(figures: dict[str, Any]) -> str:
    before, after = figures["calibration_error"]
    wrong = figures["wrong_of_decided"]
    cells = (
        f"{figures['images']:,} of `{figures['source']}`",
        _percent(figures["accuracy"]),
        f"{before:.3f}, {after:.3f}",
        _percent(figures["decided"]),
        "-" if wrong is None else _percent(wrong),
        ", ".join(_percent(risk) for risk in figures["risk"].values()),
    )
    return f"| {' | '.join(cells)} |"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
