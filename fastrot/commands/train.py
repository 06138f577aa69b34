"""`fastrot train`, and fastrot/train.py: pretraining."""

import argparse

from fastrot.commands.base import Command, Result, add_config, add_dry_run, add_resume, among_ranks, settings


def _options(parser: argparse.ArgumentParser) -> None:
    add_dry_run(parser)
    add_resume(parser)
    parser.add_argument(
        "--resume-anyway",
        action="append",
        default=[],
        metavar="KEY",
        help="let this config key differ from the checkpoint's (repeatable)",
    )
    parser.add_argument(
        "--deepspeed_config", metavar="FILE", help="DeepSpeed's own JSON; it may not contradict the YAML"
    )
    # scripts written for DeepSpeed pass it
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    add_config(parser, "data", "rotation", "model", "optim", "engine", "run")


def _run(args: argparse.Namespace) -> Result:
    config, sources = settings(args, "train")
    with among_ranks() as ranks:
        if args.dry_run:
            from fastrot.runs.dry_run import dry_run

            return dry_run(config, sources, ranks, args.deepspeed_config)
        from fastrot.runs.run import train

        return train(config, ranks, args.resume, args.resume_anyway, args.deepspeed_config)


COMMAND = Command(
    "train",
    "pretrain (fastrot/train.py is the same, for launchers)",
    "fastrot train --config configs/in1k.yaml data.train=/data/train data.val=/data/val --dry-run\n"
    "  deepspeed fastrot/train.py --config configs/in1k.yaml data.train=/data/train data.val=/data/val",
    _options,
    _run,
    "Pretrain a ResNet by predicting image rotations, in run.out; started again it goes on where it was.",
)
