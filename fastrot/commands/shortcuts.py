"""`fastrot shortcuts`: which cues a rotation network goes by."""

import argparse

from fastrot.commands.base import NETWORK, Command, Result, add_json


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="RUN|FILE.onnx",
        help=NETWORK,
    )
    parser.add_argument("--data", required=True, metavar="SOURCE", help="upright images that it was not trained on")
    parser.add_argument(
        "--images", type=int, default=1000, metavar="N", help="look at this many, evenly spread (default: 1000)"
    )
    parser.add_argument("--out", metavar="FILE.html", help="write the tables, with an image under each cue, as a page")
    add_json(parser)


def _run(args: argparse.Namespace) -> Result:
    from fastrot.orient.shortcuts import shortcuts

    return shortcuts(args.checkpoint, args.data, args.images, args.out, show=not args.json)


COMMAND = Command(
    "shortcuts",
    "which cues a rotation network goes by: what stays when they are taken away, or planted alone",
    "fastrot shortcuts --checkpoint runs/orient --data photos/val --out shortcuts.html",
    _options,
    _run,
    "A network may tell the turn of a photograph by traces that have nothing to do with what is shown: a JPEG's grid, a "
    "lens's colour fringes, a vignette, a frame, resampling. Each is taken away from all images (how much of the accuracy "
    "stays?) and planted where nothing else tells the turn (does it follow?). Intervals are 95%, by bootstrap over images; "
    "changes are paired. Configs that damage training crops against such traces: data.jpeg, data.chroma_shift, data.border, "
    "data.blur.",
)
