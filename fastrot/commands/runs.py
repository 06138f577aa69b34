"""`fastrot runs`: a table of runs, and two of them compared."""

import argparse
from pathlib import Path

from fastrot.commands.base import Command, Result, add_json


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path("runs"), metavar="FOLDER", help="that holds runs (default: runs)"
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        metavar=("A", "B"),
        help="two runs, by folder or by name in FOLDER: their config and curves",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="with --compare: write the curves there, as one page")
    add_json(parser)


def _run(args: argparse.Namespace) -> Result:
    from fastrot import terminal
    from fastrot.errors import UserError
    from fastrot.runs.overview import compared, differences, find_runs, named, show

    if args.html and not args.compare:
        raise UserError(f"--html {args.html}: is a page of two runs; say which, as in --compare A B")
    if args.compare and len(args.compare) != 2:
        raise UserError(f"--compare {' '.join(args.compare)}: expected two runs, as in --compare A B")
    runs = [named(word, args.folder) for word in args.compare] if args.compare else find_runs(args.folder)
    differing = differences([one.config for one in runs])
    if not args.compare:
        if not args.json:
            show(runs, differing)
        return {"runs": [one.plain() | {"config": {key: one.config.get(key) for key in differing}} for one in runs]}
    if args.html:
        from fastrot.report import compared as page  # with Jinja, which a table does not need

        page.write(args.html, *runs)
    if not args.json:
        show(runs, {})
        rows = [[key, *map(str, values)] for key, values in differing.items()]
        terminal.listing("how they differ", ("", *(one.name for one in runs)), rows)
    return compared(*runs) | {"html": str(args.html) if args.html else None}


COMMAND = Command(
    "runs",
    "a table of runs: state, steps, held-out figures, speed, how their configs differ; two of them compared",
    "fastrot runs runs --compare base fast --html compared.html",
    _options,
    _run,
)
