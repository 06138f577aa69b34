"""`fastrot doctor`: what this machine lacks, and what mends it."""

import argparse
import os
from contextlib import nullcontext

from fastrot.commands.base import Command, Result, add_config, among_ranks, settings


def _options(parser: argparse.ArgumentParser) -> None:
    add_config(parser, "data", "engine", "run")


def _run(args: argparse.Namespace) -> Result | None:
    from fastrot import launcher, machine, terminal
    from fastrot.errors import Unsound
    from fastrot.selfcheck.doctor import BROKEN, examine

    config, _ = settings(args)
    machine.set_caches()
    with among_ranks() if launcher.find(os.environ) else nullcontext() as ranks:
        result = examine(config, ranks)
    if ranks is not None and not ranks.first:
        return None
    if not args.json:
        rows = [(one["state"], one["what"], one["says"], one["cure"]) for one in result["checks"]]
        terminal.listing("", ("state", "what", "found", "what mends it"), rows)
    broken = [one["what"] for one in result["checks"] if one["state"] == BROKEN]
    if broken:
        raise Unsound(f"broken: {', '.join(broken)}", result)
    return result


COMMAND = Command(
    "doctor",
    "what this machine lacks or is slow at, and the command that mends it",
    "fastrot doctor --config configs/in1k.yaml data.train=/data/train run.out=/runs/in1k",
    _options,
    _run,
    "Look at versions, GPUs, decoders, compilers, limits, memory and disks, the worst first; under a launcher on every host, "
    "and at their clocks. A bug report wants this output. Exit code 0, or 1 where something that the config asks for is broken.",
)
