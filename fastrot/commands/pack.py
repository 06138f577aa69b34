"""`fastrot pack`: a source as one file."""

import argparse

from fastrot.commands.base import Command, Result, add_config, add_dry_run, add_overrides, plan, settings


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="anything data.train may be")
    parser.add_argument("out", metavar="OUT.beton", help="a new file")
    add_overrides(parser)
    parser.add_argument(
        "--mode",
        choices=("keep", "jpeg", "raw", "mix"),
        default="keep",
        help="keep: JPEG bytes as they are where upright RGB or gray, else encoded anew (default); "
        "jpeg: all encoded anew; raw: pixels; mix: raw for --raw-share of the rows, keep for the others",
    )
    parser.add_argument(
        "--quality", type=int, default=90, metavar="Q", help="of JPEGs encoded anew, 1 to 100 (default: 90)"
    )
    parser.add_argument(
        "--max-side", type=int, metavar="N", help="shrink images whose longer side is above N pixels (default: none)"
    )
    parser.add_argument(
        "--raw-share", type=float, default=0.5, metavar="P", help="--mode mix: share of raw rows (default: 0.5)"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: this machine's cores)")
    add_dry_run(parser)
    add_config(parser, "data", overrides=False)


def _run(args: argparse.Namespace) -> Result:
    from fastrot.data.encode import Encoding

    config, sources = settings(args)
    encoding = Encoding(args.mode, args.quality, args.max_side, args.raw_share)
    if args.dry_run:
        encoding.check()
        return plan(config, sources, None, [("SOURCE", args.source)], [("would write", args.out), ("mode", args.mode)])
    from fastrot.data.pack import pack

    return pack(args.source, args.out, encoding, args.workers, config.data)


COMMAND = Command(
    "pack",
    "write a source as one FFCV file (.beton), rows in order",
    "fastrot pack /data/train train.beton --mode raw --max-side 256",
    _options,
    _run,
)
