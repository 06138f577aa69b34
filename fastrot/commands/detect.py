"""`fastrot detect`: learn boxes, and masks, of objects with a detector on a backbone."""

import argparse

from fastrot.commands.base import (
    Command,
    Result,
    add_learning,
    among_ranks,
    settings,
)


def _options(parser: argparse.ArgumentParser) -> None:
    add_learning(parser, "detect")


def _run(args: argparse.Namespace) -> Result:
    config, sources = settings(args, "detect")
    with among_ranks() as ranks:
        from fastrot.runs.detect import prepared

        learning = prepared(args.checkpoint, args.random_init, config, ranks)
        return learning.dry_run(sources, ranks) if args.dry_run else learning.train(ranks, args.resume)


COMMAND = Command(
    "detect",
    "learn boxes, and masks, of objects with a detector on a backbone",
    "fastrot detect --checkpoint runs/in1k --config configs/detect_voc0712_c4_24k.yaml "
    "'data.train=voc:/data/VOC2007?split=trainval+voc:/data/VOC2012?split=trainval' "
    "'data.val=voc:/data/VOC2007?split=test'",
    _options,
    _run,
    "Faster R-CNN (detect.model c4) or Mask R-CNN (fpn) begins with a pretrained backbone, learns the objects of data.train (voc: or coco:), "
    "and is judged on data.val, in run.out.",
)
