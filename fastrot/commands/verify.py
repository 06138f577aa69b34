"""`fastrot verify`: whether a run's folder still is what the run wrote."""

import argparse
from pathlib import Path

from fastrot.commands.base import Command, Result, add_json


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, a checkpoint's, or a feature store's")
    add_json(parser)


def _run(args: argparse.Namespace) -> Result:
    from fastrot import terminal
    from fastrot.errors import Unsound
    from fastrot.runs.audit import DAMAGED, audit

    result = audit(args.run)
    resume = f"a resume would take {result['resume']}" if result["resume"] else "a resume has no checkpoint to take"
    if not args.json:
        rows = [(one["state"], one["what"], one["says"]) for one in result["findings"]]
        terminal.listing(str(args.run), ("", "", ""), rows)
        print(resume)
    damaged = [one["what"] for one in result["findings"] if one["state"] == DAMAGED]
    if damaged:
        raise Unsound(f"{args.run}: damaged: {', '.join(dict.fromkeys(damaged))}; {resume}", result)
    return result


COMMAND = Command(
    "verify",
    "whether a run's checkpoints, manifest, log and stream are what the run wrote",
    "fastrot verify runs/in1k",
    _options,
    _run,
    "Hash every checkpoint, read the log and the status, compare the manifest and the image files with what was indexed, "
    "compute the stream of every recorded epoch again, and say what is sound, what is damaged and which checkpoint a resume "
    "would take. Only reads: a run that is being written is not disturbed. Exit code 0: sound, 1: damaged.",
)
