"""`fastrot index`: what is in a source."""

import argparse
import re

from fastrot.commands.base import Command, Result, add_config, add_dry_run, plan, settings
from fastrot.errors import UserError


def _options(parser: argparse.ArgumentParser) -> None:
    parser.usage = "fastrot index [SOURCE] [--verify] [--json] [--dry-run] [--config FILE] [section.key=value ...]"
    parser.add_argument(
        "--verify", action="store_true", help="decode every image in full and quarantine what is damaged"
    )
    add_dry_run(parser)
    add_config(parser, "data", overrides=False)
    parser.add_argument(
        "words",
        nargs="*",
        metavar="SOURCE, section.key=value",
        help="what to index (default: data.train); overrides of the config, the last one wins",
    )


def _run(args: argparse.Namespace) -> Result:
    # a source's own `=` comes later in it
    args.overrides = [word for word in args.words if re.match(r"[A-Za-z_]\w*\.\w+=", word)]
    places = [word for word in args.words if word not in args.overrides]
    if len(places) > 1:
        raise UserError(f"{places[1]!r}: expected section.key=value; one source at a time is indexed")
    config, sources = settings(args)
    source = places[0] if places else config.data.train
    if args.dry_run:
        by = "decode every image, quarantine what is damaged" if args.verify else "say what is in it"
        return plan(config, sources, None, [("data.train", source)], [("would", by)])
    from fastrot.data.contents import describe_source
    from fastrot.data.stage import of_config

    source = of_config(source, config.data.stage, "data.train")
    return describe_source(source, config.data.max_pixels, args.verify)


COMMAND = Command(
    "index",
    "index a source and say what is in it",
    "fastrot index '/data/shards/train-{000..146}.tar' --verify",
    _options,
    _run,
    "Index SOURCE (default: data.train) and say what is in it: a folder of class folders, list:FILE, tar shards, "
    "or voc:ROOT?split=S.",
)
