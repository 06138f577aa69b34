"""`fastrot stage`: a source from a store to this machine's disk."""

import argparse
from pathlib import Path

from fastrot.commands.base import Command, Result, add_json


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="address of a folder, a file or files by {000..146} or a pattern: s3://, gs://, http(s)://, file:// or a "
        "path; or list:ADDRESS of a text whose lines begin with names",
    )
    parser.add_argument("dest", metavar="DEST", help="a folder of its own on this machine's disk")
    add_json(parser)


def _run(args: argparse.Namespace) -> Result:
    from fastrot import terminal
    from fastrot.data.stage import stage

    result = stage(args.source, Path(args.dest))
    how = ", ".join(f"{count:,} by {kind}" for kind, count in sorted(result["verified_by"].items()))
    fetched = f"{result['fetched_bytes'] / 1e9:.3f} GB in {terminal.duration(result['seconds'])}, {result['mb_per_s']:.0f} MB/s"
    rows = [
        ("files", f"{result['files']:,}, {result['bytes'] / 1e9:.3f} GB"),
        ("fetched now", fetched if result["fetched_bytes"] else "nothing: all is there"),
        ("verified", how + (" alone, where the source gives no checksum" if "size" in result["verified_by"] else "")),
        ("to train on it", f"data.train={result['data']}"),
    ]
    terminal.table(result["source"], rows)
    return result


COMMAND = Command(
    "stage",
    "copy a source from a store to this machine's disk, verified",
    "fastrot stage s3://bucket/imagenet/train /local/train",
    _options,
    _run,
    "Copy SOURCE into DEST: many files at once, on from where a kill or a cut left it, each verified by SHA256SUMS beside "
    "it, the server's own checksum, or its size. Of several processes one copies and the others wait.",
)
