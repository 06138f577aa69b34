"""`fastrot orient`: which way is up in each image of a source."""

import argparse

from fastrot.commands.base import Command, Result, add_json
from fastrot.errors import UserError


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
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="SOURCE is held-out images that are upright: find how far a run's answers can be believed, and from which "
        "probability on they count; kept in the run's folder, orientation.json and calibration.html",
    )
    parser.add_argument("--without-up", metavar="SOURCE", help="--calibrate: pictures that have no up")
    parser.add_argument(
        "--also", metavar="SOURCE", help="--calibrate: upright images of another kind, judged by what was chosen"
    )
    add_json(parser)


def _run(args: argparse.Namespace) -> Result:
    if args.calibrate:
        return _calibrate(args)
    if args.without_up is not None or args.also is not None:
        raise UserError("--without-up and --also are for --calibrate")
    from fastrot.orient.job import orient

    return orient(args.source, args.checkpoint, args.out, args.min_confidence, show=not args.json)


def _calibrate(args: argparse.Namespace) -> Result:
    if args.out is not None or args.min_confidence is not None:
        raise UserError(
            "--calibrate: takes no --out and no --min-confidence; it keeps what it finds in the run's folder"
        )
    from fastrot.orient.calibrate import calibrate
    from fastrot.report.trust_page import write

    result = calibrate(args.source, args.checkpoint, args.without_up, args.also, show=not args.json)
    return result | {"page": write(result)}


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
