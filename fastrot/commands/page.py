"""`fastrot page`: the benchmark page."""

import argparse
from typing import TYPE_CHECKING

from fastrot.commands.base import STORE, Command, Result, add_config, add_dry_run, among_ranks, plan, settings
from fastrot.errors import UserError

if TYPE_CHECKING:
    from fastrot.config import Config
    from fastrot.distributed import Ranks


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="C", help=STORE)
    parser.add_argument("--suite", required=True, metavar="FILE", help="which sets and probes, as in configs/page.yaml")
    parser.add_argument("--out", required=True, metavar="DIR", help="features, results and page.html, .md, .json")
    add_dry_run(parser)
    add_config(parser, "data")


def _run(args: argparse.Namespace) -> Result:
    config, sources = settings(args)
    with among_ranks() as ranks:
        if args.dry_run:
            return _dry(args, config, sources, ranks)
        from fastrot.report.page import build

        return build(args.checkpoint, args.suite, args.out, config, ranks)


def _dry(args: argparse.Namespace, config: "Config", sources: dict[str, str], ranks: "Ranks") -> Result:
    from fastrot.report import suite

    chosen = suite.load(args.suite)
    does = []
    for one in chosen.sets:
        does.append((one.name, f"{', '.join(one.probes)}{_gap(one.name, [one.train, one.test], config, ranks)}"))
    for run in chosen.runs:
        does.append((run.name, f"{run.task}{_gap(run.name, [run.train, run.test], config, ranks)}"))
    return plan(config, sources, ranks, [], [*does, ("would write", args.out)])


def _gap(name: str, data: list[str], config: "Config", ranks: "Ranks") -> str:
    """How many images there are, or why there are none."""
    from fastrot.data.build import open_manifest

    try:
        rows = [len(open_manifest(source, config, ranks, name)) for source in data]
    except UserError as error:
        return f": left out: {str(error).splitlines()[0]}"
    return f" on {rows[0]:,} and {rows[1]:,} images"


COMMAND = Command(
    "page",
    "run a suite of probes and write the report",
    "fastrot page --checkpoint runs/in1k --suite configs/page.yaml --out page",
    _options,
    _run,
)
