"""`fastrot bench`: how fast this machine loads, turns and trains, with the evidence."""

import argparse
from pathlib import Path
from typing import Any

from fastrot.commands.base import Command, Result, add_config, settings

_PARTS = ("load", "rotate", "step", "train", "probes")
_DRAWN = 256  # images, where no source is named
_AT_ONCE = {"cuda": 128, "cpu": 8}  # images a step, where no config is named


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--parts", nargs="+", choices=_PARTS, default=list(_PARTS[:4]), help="default: all but the probes"
    )
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="fresh processes an arm (default: 7)")
    parser.add_argument("--seconds", type=float, default=5, metavar="S", help="of timing a round (default: 5)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the evidence there, round by round: every lap")
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("A", "B"), help="two such files: how many times A's speed is B's"
    )
    add_config(parser, "data", "rotation", "model", "optim", "engine")


def _run(args: argparse.Namespace) -> Result:
    if args.compare:
        return _compared(*args.compare)
    from fastrot.errors import UserError

    if args.rounds < 1 or not args.seconds > 0:
        raise UserError(f"--rounds {args.rounds} of --seconds {args.seconds:g}: both must be above 0")
    if args.out and not args.out.parent.is_dir():
        raise UserError(f"--out {args.out}: {args.out.parent} is no folder")
    import json
    import tempfile

    import torch

    from fastrot import files, terminal
    from fastrot.benchmark import rounds
    from fastrot.selfcheck.images import drawn

    if not args.config:
        some = _AT_ONCE["cuda" if torch.cuda.is_available() else "cpu"]
        args.overrides = [f"optim.images_per_step={some}", *args.overrides]
    with tempfile.TemporaryDirectory(prefix="fastrot-bench-") as scratch:
        if not any(word.startswith("data.train=") for word in args.overrides) and not args.config:
            args.overrides = [*args.overrides, f"data.train={drawn(Path(scratch), _DRAWN)}"]
        config, _ = settings(args)
        if config.data.train is None:
            raise UserError("data.train: names no images; leave --config out to bench on drawn ones")

        def keep(bundle: dict[str, Any]) -> None:
            files.write_text(args.out, json.dumps(bundle, indent=1) + "\n")

        bundle = rounds.bench(config, args.parts, args.rounds, args.seconds, keep=keep if args.out else None)
    terminal.table("95% intervals of medians", list(rounds.shown(bundle)))
    return bundle


def _compared(old: Path, new: Path) -> Result:
    from fastrot import terminal
    from fastrot.benchmark.compare import compare, read, says

    found = compare(read(old), read(new))
    rows = [(name, says(one["ratio"], *one["interval"])) for name, one in found["ratios"].items()]
    rows += [(name, "in one of the two alone") for name in found["in_one_alone"]]
    rows += [("differs", f"{key}: {a} and {b}") for key, (a, b) in found["differs"].items()]
    terminal.table(f"speed of {new} over {old}", rows)
    return found


COMMAND = Command(
    "bench",
    "how fast this machine loads, turns and trains, with the evidence; and one machine beside another",
    "fastrot bench --config configs/in1k.yaml data.train=/data/train --out h100.json",
    _options,
    _run,
    "Each arm first passes a gate (equal to its reference, or no figure), then runs in rounds of random order, a fresh "
    "process each, and --out has it from then on. The file holds every lap, versions, machine, clocks, the images' hash and "
    "the command; --compare puts two beside each other. Without --config: ResNet-50 at 224 pixels on drawn photographs.",
)
