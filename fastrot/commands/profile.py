"""`fastrot profile`: what bounds a training here, and what would help."""

import argparse
import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from fastrot.commands.base import Command, Result, add_config, add_dry_run, among_ranks, plan, settings
from fastrot.errors import UserError

if TYPE_CHECKING:  # what imports torch is imported where it is used
    from fastrot.config import Config
    from fastrot.distributed import Ranks
    from fastrot.runs.profile import Profiled

_PREPARE = {"linear": "heads", "finetune": "finetune", "detect": "detect", "segment": "segment"}  # modules of runs


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--task", choices=("train", *_PREPARE, "features"), help="the command that is profiled (default: the config's)"
    )
    parser.add_argument("--seconds", type=float, default=60, metavar="S", help="seconds of timing in all (default: 60)")
    parser.add_argument("--try", action="store_true", dest="attempt", help="train with each setting that is proposed")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write three steps for Chrome or Perfetto (.json)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page of it")
    add_dry_run(parser)
    add_config(parser, "data", "rotation", *_PREPARE, "model", "optim", "engine", "run")


def _run(args: argparse.Namespace) -> Result:
    from fastrot.config import command_of

    task = args.task or command_of(args.config, args.overrides)
    config, sources = settings(args, None if task == "features" else task)
    for option, path in (("--trace", args.trace), ("--html", args.html)):
        _refuse_unwritable(option, path)
    with among_ranks() as ranks:
        if args.dry_run:
            does = [("would time", f"the stages of fastrot {task} in {args.seconds:g} s")]
            return plan(config, sources, ranks, [("data.train", config.data.train)], does)
        from fastrot.runs.profile import profile

        config, what = _profiled(task, config, ranks)
        result = profile(config, ranks, args.seconds, args.attempt, args.trace, what)
        if args.html and ranks.first:
            from fastrot.report.profile_page import write

            write(result, args.html)
        return result


def _profiled(task: str, config: "Config", ranks: "Ranks") -> tuple["Config", "Profiled"]:
    """Of what begins from a backbone the weights are drawn: they change no pace."""
    from fastrot.runs.profile import Profiled

    if task == "train":
        return config, Profiled()
    if task == "features":
        return config, Profiled(None)
    learning = import_module(f"fastrot.runs.{_PREPARE[task]}").prepared(None, config.run.seed, config, ranks)
    return learning.begin.config, Profiled(learning.make_job, learning.choose, task not in ("detect", "segment"))


def _refuse_unwritable(option: str, path: Path | None) -> None:
    if path is None:
        return
    if not path.parent.is_dir():
        raise UserError(f"{option} {path}: {path.parent} is no folder")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{option} {path}: cannot be written")


COMMAND = Command(
    "profile",
    "what bounds a training here, what would help, and (--try) whether it did",
    "fastrot profile --config configs/in1k.yaml data.train=/data/train --try",
    _options,
    _run,
    "Time reading (from the disk and from memory), decoding, resampling, the hand-over of batches, the whole data path, "
    "the step and all together, each by itself; say which one bounds the training and what comes next; measure settings "
    "that change it and predict the pace they give. --try trains with each and prints what was predicted beside what was "
    "achieved. Nothing is written but the files that are named.",
)
