"""`fastrot finetune`: the whole network learns classes."""

import argparse

from fastrot.commands.base import (
    Command,
    Result,
    add_backbone,
    add_config,
    add_dry_run,
    add_resume,
    among_ranks,
    settings,
)


def _options(parser: argparse.ArgumentParser) -> None:
    add_backbone(parser)
    add_resume(parser)
    add_dry_run(parser)
    add_config(parser, "data", "rotation", "finetune", "model", "optim", "engine", "run")


def _run(args: argparse.Namespace) -> Result:
    config, sources = settings(args, "finetune")
    with among_ranks() as ranks:
        from fastrot.runs import finetune

        if args.dry_run:
            from fastrot.runs.dry_run import dry_run

            begin, job, choose = finetune.prepared(args.checkpoint, args.random_init, config, ranks)
            return dry_run(begin.config, sources, ranks, None, job, choose)
        return finetune.fine_tune(args.checkpoint, args.random_init, config, ranks, args.resume)


COMMAND = Command(
    "finetune",
    "learn classes with the whole network, from all or few of the images",
    "fastrot finetune --checkpoint runs/in1k --config configs/semi_in1k_1.yaml data.train=/data/train data.val=/data/val",
    _options,
    _run,
    "Train a pretrained backbone and a last layer together on data.train, or on the share of it that "
    "finetune.fraction draws or finetune.names lists, judged on data.val, in run.out.",
)
