"""`fastrot stream`: the exact stream, shown."""

import argparse

from fastrot.commands.base import Command, Result, add_config, add_dry_run, among_ranks, plan, settings


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--first-step", type=int, default=0, metavar="A", help="0-based step to begin at (default: 0)")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="steps to print (default: 10)")
    parser.add_argument("--ranks", type=int, default=1, metavar="R", help="plan as this many ranks would (default: 1)")
    parser.add_argument("--decode", metavar="D", help="same as data.decode=D")
    parser.add_argument("--pixels", action="store_true", help="decode, and hash the crops too")
    add_dry_run(parser)
    add_config(parser, "data", "rotation", "model", "optim", "engine", "run")


def _run(args: argparse.Namespace) -> Result:
    args.overrides += [f"data.decode={args.decode}"] if args.decode else []
    config, sources = settings(args)
    with among_ranks() as ranks:
        if args.dry_run:
            does = [("would print", f"steps {args.first_step} to {args.first_step + args.steps - 1}")]
            return plan(config, sources, ranks, [("data.train", config.data.train)], does)
        from fastrot.runs.stream import stream

        result = stream(config, ranks, args.first_step, args.steps, args.ranks, args.pixels)
        if not args.json:
            for name in ("sha256", "pixels_sha256"):
                if name in result:
                    print(f"{name} {result[name]}")
        return result


COMMAND = Command(
    "stream",
    "print and hash steps of the stream, without training",
    "fastrot stream --config configs/in1k.yaml data.train=/data/train --first-step 0 --steps 50 --ranks 4",
    _options,
    _run,
)
