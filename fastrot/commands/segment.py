"""`fastrot segment`: learn the class of each pixel with a segmenter on a backbone."""

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
    add_config(parser, "data", "rotation", "segment", "model", "optim", "engine", "run")


def _run(args: argparse.Namespace) -> Result:
    config, sources = settings(args, "segment")
    with among_ranks() as ranks:
        from fastrot.runs import segment

        if args.dry_run:
            from fastrot.runs.dry_run import dry_run

            begin, job, _ = segment.prepared(args.checkpoint, args.random_init, config, ranks)
            return dry_run(begin.config, sources, ranks, None, job)
        return segment.train_segmenter(args.checkpoint, args.random_init, config, ranks, args.resume)


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
