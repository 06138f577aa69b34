"""`fastrot orient`: which way is up in each image of a source."""

import argparse

from fastrot.commands.base import Command, Result, add_json


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a folder of images, at any depth; or list:, tar shards, ...")
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="RUN|FILE.onnx",
        help="a run folder of fastrot train, one of its checkpoints, or what fastrot export --to onnx --head wrote",
    )
    parser.add_argument(
        "--out",
        metavar="FILE.jsonl",
        help="write the answers there, one line of JSON an image, and a contact sheet beside it, FILE.html "
        "(default: nothing is written, the table alone is printed)",
    )
    parser.add_argument(
        "--min-confidence",
        type=float,
        metavar="P",
        help="leave images undecided that are less sure than this (default: the network's own threshold)",
    )
    add_json(parser)


def _run(args: argparse.Namespace) -> Result:
    from fastrot.orient.job import orient

    return orient(args.source, args.checkpoint, args.out, args.min_confidence, show=not args.json)


COMMAND = Command(
    "orient",
    "which way is up in each image of a source, and how sure that is",
    "fastrot orient photos/ --checkpoint runs/orient --out orient.jsonl",
    _options,
    _run,
    "Shows each image to the network in all four turns and joins what it says. Images that have no up, or that it cannot "
    "tell, stay undecided. The source is never touched. A line of --out holds file, row, class, clockwise (degrees that "
    "put the image upright), probabilities (of having been turned by 0, 90, 180, 270 degrees counter-clockwise), decided, "
    "exif (the orientation by which it is shown) and tag (right, wrong, missing or none); of a file that cannot be read "
    "file and unreadable (why).",
)
