"""`fastrot segment`: learn the class of each pixel with a segmenter on a backbone."""

import argparse

from fastrot.commands.base import (
    Command,
    Result,
    add_learning,
    among_ranks,
    settings,
)


def _options(parser: argparse.ArgumentParser) -> None:
    add_learning(parser, "segment")


def _run(args: argparse.Namespace) -> Result:
    config, sources = settings(args, "segment")
    with among_ranks() as ranks:
        from fastrot.runs.segment import prepared

        learning = prepared(args.checkpoint, args.random_init, config, ranks)
        return learning.dry_run(sources, ranks) if args.dry_run else learning.train(ranks, args.resume)


COMMAND = Command(
    "segment",
    "learn the class of each pixel with a segmenter on a backbone",
    "fastrot segment --checkpoint runs/in1k --config configs/segment_voc12aug_fcn_20k.yaml "
    "'data.train=vocseg:/data/VOC2012?split=train+aug' "
    "'data.val=vocseg:/data/VOC2012?split=val'",
    _options,
    _run,
    "A fully convolutional segmenter begins with a pretrained backbone, learns the masks of data.train (vocseg:, cityscapes: or pairs:), "
    "and is judged on data.val, in run.out.",
)
