"""`fastrot config`: the config as it is resolved, or its schema."""

import argparse
import json

from fastrot.commands.base import Command, Result, add_config, settings


def _options(parser: argparse.ArgumentParser) -> None:
    from fastrot.config import Config

    parser.add_argument(
        "--schema", action="store_true", help="print the JSON schema of config files instead, for editors to complete"
    )
    add_config(parser, *Config.model_fields)


def _run(args: argparse.Namespace) -> Result | None:
    from fastrot.config import Config, flat

    if args.schema:
        print(json.dumps(Config.model_json_schema(), indent=1))
        return None
    config, sources = settings(args)
    values = flat(config)
    if not args.json:
        wide = max(map(len, values))
        for key, value in values.items():
            print(f"{key:{wide}}  {json.dumps(value, ensure_ascii=False)}  ({sources[key]})")
    return {key: {"value": value, "source": sources[key]} for key, value in values.items()}


COMMAND = Command(
    "config",
    "print the resolved config and where each value is from, or its JSON schema",
    "fastrot config --config configs/in1k.yaml optim.lr=0.1\n  fastrot config --schema > fastrot.schema.json",
    _options,
    _run,
)
