"""`fastrot odd`: the odd images of a source."""

import argparse

from fastrot.commands.base import IMAGES, NETWORK, Command, Result, add_json


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help=IMAGES)
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="RUN|FILE.onnx",
        help=NETWORK,
    )
    parser.add_argument(
        "--out",
        metavar="FILE.jsonl",
        help="write the ranking there, one line of JSON an image, and a contact sheet beside it, FILE.html "
        "(default: nothing is written, the oddest are printed)",
    )
    add_json(parser)


def _run(args: argparse.Namespace) -> Result:
    from fastrot.orient.odd import odd

    return odd(args.source, args.checkpoint, args.out, show=not args.json)


COMMAND = Command(
    "odd",
    "the odd images of a source: those whose turns a network tells apart worst",
    "fastrot odd photos/ --checkpoint runs/orient --out odd.jsonl",
    _options,
    _run,
    "The network should have learnt images of the usual kind, upright ones, and from these alone. An image that is turned "
    "is odd too: fastrot orient first. A line of --out holds file, row, class and score, the oddest first.",
)
