"""`fastrot profile`: what bounds a training here, and what would help."""

import argparse
from pathlib import Path

from fastrot.commands.base import Command, Result, add_config, add_dry_run, among_ranks, plan, settings


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=60, metavar="S", help="seconds of timing in all (default: 60)")
    parser.add_argument("--try", action="store_true", dest="attempt", help="train with each setting that is proposed")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write three steps for Chrome or Perfetto (.json)")
    add_dry_run(parser)
    add_config(parser, "data", "rotation", "model", "optim", "engine", "run")


def _run(args: argparse.Namespace) -> Result:
    config, sources = settings(args)
    with among_ranks() as ranks:
        if args.dry_run:
            does = [("would time", f"six stages in {args.seconds:g} s")]
            return plan(config, sources, ranks, [("data.train", config.data.train)], does)
        from fastrot.runs.profile import profile

        return profile(config, ranks, args.seconds, args.attempt, args.trace)


COMMAND = Command(
    "profile",
    "what bounds a training here, what would help, and (--try) whether it did",
    "fastrot profile --config configs/in1k.yaml data.train=/data/train --try",
    _options,
    _run,
    "Time reading (from the disk and from memory), decoding, the whole data path, the step and all together, each by "
    "itself; say which one bounds the training and what comes next; measure settings that change it and predict the "
    "pace they give. --try trains with each and prints what was predicted beside what was achieved. Nothing is written.",
)
