"""`fastrot demo-data`: the drawn scenes."""

import argparse
from pathlib import Path

from fastrot.commands.base import Command


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write: train/ and val/, a folder a class"
    )
    parser.add_argument("--train", type=int, default=4000, metavar="N", help="images to train on (default: 4000)")
    parser.add_argument("--val", type=int, default=400, metavar="N", help="images held out (default: 400)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="SEED", help="another seed draws other scenes (default: 0)"
    )


def _run(args: argparse.Namespace) -> None:
    from fastrot.demo.scenes import write

    write(args.out, args.train, args.val, args.seed)


COMMAND = Command(
    "demo-data",
    "draw the demo's data set of small upright scenes",
    "fastrot demo-data --out runs/demo-data --train 4000 --val 400 --seed 0",
    _options,
    _run,
)
