"""Does `fastrot estimate`, from a profile of one process, foretell what this machine's processes reach?"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import harness
import yaml

import fastrot.machine

NARROW = Path(__file__).resolve().parent.parent / "tests" / "workers" / "narrow_command.py"
GPUS = fastrot.machine.cores()  # a core is a "GPU"
RUNS = 5
PROCESSES = (1, 2, 4)
SMALL = [
    "model.arch=resnet18", "engine.kind=plain", "engine.precision=fp32", "data.threads=1", "data.crop=64",
    "optim.images_per_step=64",
]  # fmt: skip


def environment(rank: int, world: int, local: int, port: int) -> dict[str, str]:
    ours = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": local, "MASTER_PORT": port}
    return {**os.environ, **{key: str(value) for key, value in ours.items()}, "MASTER_ADDR": "127.0.0.1"}


def started(words: list[str], world: int) -> str:
    """Standard output of rank 0; a process has as many of the cores as if all "GPUs" had one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(NARROW), *words],
            env=environment(rank, world, max(world, GPUS), port),
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            stderr=subprocess.DEVNULL if rank else None,
            text=True,
        )
        for rank in range(world)
    ]
    said, _ = ranks[0].communicate()
    if any(one.wait() for one in ranks):
        raise SystemExit(f"{world} processes: {' '.join(words)} failed")
    return said


def hardware(folder: Path, profile: dict, kib: float) -> Path:
    """This machine as a node whose GPUs are its cores."""
    known = {"source": "assumed", "note": "plays no part: the step is profiled"}
    none = {"value": 1e12, "low": 1e12, "high": 1e12, **known}
    names = ("matmul_flops", "memory_bytes", "gpu_decode", "core_decode", "link_bytes", "net_bytes")
    node = {name: none for name in names}
    node |= {
        name: none | {"value": 1e-6, "low": 1e-6, "high": 1e-6}
        for name in ("launch_s", "net_latency_s", "link_latency_s")
    }
    read = profile["stages"]["warm"]["pace"] * 1024 * kib
    note = {"source": "measured", "note": "the profile's reading from memory"}
    node |= {"storage_bytes": {"value": read, "low": read, "high": read, **note}}
    node |= {"gpu_hours_to_failure": none | {"value": 1e6, "low": 1e6}, "restart_s": none | {"value": 0, "low": 0}}
    path = folder / "here.yaml"
    named = {"name": "this machine's cores", "fabric": "gloo", "gpus": GPUS, "cores": GPUS, "gpu_memory_gib": 4}
    path.write_text(yaml.safe_dump(named | node))
    return path


def achieved(words: list[str], world: int, out: Path, steps: int) -> dict[str, float]:
    """Medians of one run's lines, without the first: views/s, and rank 0's step by shares."""
    run = [*words, f"run.out={out}", "run.tensorboard=false", f"run.max_steps={steps}", f"run.log_every={steps // 4}"]
    started(["train", *run, "--resume", "never", "optim.epochs=1000", "run.checkpoint_every=1000000"], world)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    names = [name for name in lines[0] if name.endswith("_share") or name in ("views_per_s", "step_s")]
    return {name: statistics.median(line[name] for line in lines[1:]) for name in names}


def said(processes: str, one: dict) -> str:
    """Predicted beside achieved."""
    (low, middle, high), paces = one["predicted"], one["achieved"]
    median = statistics.median(paces)
    held = "within its interval" if low <= median <= high else "outside its interval"
    return (
        f"{processes} processes: {middle:,.0f} views/s predicted ({low:,.0f} to {high:,.0f}), {median:,.0f} achieved "
        f"({paces[0]:,.0f} to {paces[-1]:,.0f}): {middle / median - 1:+.0%}, {held}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="folder of images")
    parser.add_argument(
        "--processes", type=int, choices=PROCESSES, help="one part: run so many; default: profile alone"
    )
    parser.add_argument("--seconds", type=float, default=60, help="of the profile")
    parser.add_argument("--steps", type=int, default=60, help="of a run")
    parser.add_argument("--out", type=Path, required=True, help="JSON that each part adds to")
    arguments = parser.parse_args()
    known = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    files = [path for path in Path(arguments.data).rglob("*") if path.is_file()]
    kib = sum(path.stat().st_size for path in files) / len(files) / 1024
    words = [*SMALL, f"data.train={arguments.data}"]
    if arguments.processes is None:
        says = started(["profile", *words, "--seconds", str(arguments.seconds), "--json"], 1)
        known = {"question": __doc__, "facts": harness.facts(), "profile": json.loads(says.splitlines()[-1])}
    else:
        with tempfile.TemporaryDirectory() as folder:
            part = known.setdefault("processes", {}).setdefault(str(arguments.processes), {})
            part |= foretold(known["profile"], words, arguments.processes, len(files), kib, Path(folder))
            runs = [
                achieved(words, arguments.processes, Path(folder) / str(number), arguments.steps)
                for number in range(RUNS)
            ]
            paces = sorted(run["views_per_s"] for run in runs)
            part |= {"achieved": paces, "off": part["predicted"][1] / statistics.median(paces) - 1, "runs": runs}
        for processes, one in known["processes"].items():
            print(said(processes, one))
    arguments.out.write_text(json.dumps(known, indent=1) + "\n")


def foretold(profile: dict, words: list[str], processes: int, images: int, kib: float, folder: Path) -> dict:
    """What fastrot estimate says."""
    (folder / "profile.json").write_text(json.dumps(profile))
    options = [
        "--hardware",
        str(hardware(folder, profile, kib)),
        "--gpus-per-node",
        str(processes),
        "--images",
        str(images),
    ]
    says = started(
        ["estimate", *words, *options, "--image-kib", str(kib), "--from", str(folder / "profile.json"), "--json"], 1
    )
    (plan,) = json.loads(says.splitlines()[-1])["plans"]
    return {"predicted": plan["views_per_s"], "step": plan["step"]}


if __name__ == "__main__":
    main()
