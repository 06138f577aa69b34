"""`fastrot finetune`: the whole network learns classes."""

import argparse

from fastrot.commands.base import (
    Command,
    Result,
    add_learning,
    among_ranks,
    settings,
)


def _options(parser: argparse.ArgumentParser) -> None:
    add_learning(parser, "finetune")


def _run(args: argparse.Namespace) -> Result:
    config, sources = settings(args, "finetune")
    with among_ranks() as ranks:
        from fastrot.runs.finetune import prepared

        learning = prepared(args.checkpoint, args.random_init, config, ranks)
        return learning.dry_run(sources, ranks) if args.dry_run else learning.train(ranks, args.resume)


COMMAND = Command(
    "finetune",
    "learn classes with the whole network, from all or few of the images",
    "fastrot finetune --checkpoint runs/in1k --config configs/semi_in1k_1.yaml data.train=/data/train data.val=/data/val",
    _options,
    _run,
    "Train a pretrained backbone and a last layer together on data.train, or on the share of it that "
    "finetune.fraction draws or finetune.names lists, judged on data.val, in run.out.",
)
