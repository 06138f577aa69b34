"""What commands are made of: words, an example, a call; the options and steps that several share."""

import argparse
import os
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what imports torch or pydantic is imported where it is used
    from fastrot.config import Config
    from fastrot.distributed import Ranks

Result = dict[str, Any]
STORE = "a run folder, a checkpoint, or any ResNet's .safetensors or .pth"
NETWORK = "a run folder of fastrot train, one of its checkpoints, or what fastrot export --to onnx --head wrote"
IMAGES = "a folder of images, at any depth; or list:, tar shards, ..."


@dataclass(frozen=True)
class Command:
    """says: a line for the list. options: adds the command's own. run: does it; its result is what --json prints,
    None where the command prints its own."""

    name: str
    says: str
    example: str
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Result | None]
    description: str = ""

    def parser(self) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(
            f"fastrot {self.name}",
            description=textwrap.fill(self.description or f"{self.says[0].upper()}{self.says[1:]}.", 100),
            epilog=f"example:\n  {self.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.options(parser)
        return parser


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as one line of JSON on standard output")


def add_config(parser: argparse.ArgumentParser, *sections: str, overrides: bool = True) -> None:
    """--config, overrides, --json. sections: of the config, that the command reads."""
    reads = ", ".join(sections)
    parser.add_argument("--config", metavar="FILE", help=f"YAML file; sections that are read: {reads}")
    add_json(parser)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    if overrides:
        add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="override a key of the config; the last one wins"
    )


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be done, and write nothing but named caches"
    )


def add_resume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto: the newest sound checkpoint of run.out, if any; or a checkpoint or run folder (default: auto)",
    )


def add_backbone(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", metavar="C", help=STORE)
    parser.add_argument("--random-init", type=int, metavar="SEED", help="the control: an untrained model.arch instead")


def add_learning(parser: argparse.ArgumentParser, section: str) -> None:
    """Of what is trained on from a backbone. section: of the config, its own."""
    add_backbone(parser)
    add_resume(parser)
    add_dry_run(parser)
    add_config(parser, "data", "rotation", section, "model", "optim", "engine", "run")


def add_stores(parser: argparse.ArgumentParser) -> None:
    """Of the probes, which read feature stores: they take no config and run without ranks."""
    parser.add_argument("--train", required=True, metavar="DIR", help="feature store to fit")
    parser.add_argument("--test", required=True, metavar="DIR", help="feature store to judge by")
    add_fit(parser)
    add_json(parser)


def add_fit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", metavar="A,B", help="taps, such as feature4,feature5 (default: all)")
    parser.add_argument("--out", metavar="FILE", help="write every figure on stored features to this JSON file")
    parser.add_argument(
        "--device", default="auto", metavar="auto|cpu|cuda", help="where stored features are fitted (default: auto)"
    )


def numbers(text: str) -> list[int]:
    """ "1,2" -> [1, 2], for argparse: each 1 or more."""
    values = [int(word) for word in text.split(",")]
    if min(values) < 1:
        raise ValueError
    return values


def settings(args: argparse.Namespace, command: str | None = None) -> "tuple[Config, dict[str, str]]":
    """The resolved config of --config and overrides, and where each value is from. command: as for config.load."""
    from fastrot.config import load

    warnings.filterwarnings("ignore", module=r"torch\..*|deepspeed\..*")
    config, sources = load(args.config, args.overrides, command)
    return with_precision(config), sources


def with_precision(config: "Config") -> "Config":
    """`engine.precision: auto` as this machine's, said in a line."""
    if config.engine.precision != "auto":
        return config
    from fastrot import machine, terminal
    from fastrot.config import flat, from_values

    precision, why = machine.precision(max([config.data.crop, *config.data.crop_by_epoch.values()]))
    if os.environ.get("RANK", "0") == "0":
        terminal.console().print(f"engine.precision auto: {precision}; {why}", soft_wrap=True)
    return from_values(None, flat(config) | {"engine.precision": precision})


@contextmanager
def among_ranks() -> Iterator["Ranks"]:
    """This process among its ranks. After a Fault the others sit in a collective: leaving would wait for them."""
    from fastrot import distributed
    from fastrot.errors import UserError

    ranks = distributed.start()
    try:
        with distributed.lost_peer_is_a_fault(ranks):
            yield ranks
    except BaseException as error:
        if isinstance(error, UserError) or ranks.world == 1:
            distributed.end()
        raise
    distributed.end()


def plan(
    config: "Config",
    sources: dict[str, str],
    ranks: "Ranks | None",
    data: list[tuple[str, str | None]],
    does: list[tuple[str, str]],
) -> Result:
    """What --dry-run says where nothing is trained: the config, the rows of the data, what would be done.

    data  (key, source) of each; indexed, since a wrong source is what a dry run is there to find.
    does  (what, value): outputs and what they depend on.
    """
    from fastrot import terminal
    from fastrot.config import flat, table
    from fastrot.data.index import in_cache
    from fastrot.data.manifest import Manifest
    from fastrot.data.remarks import describe
    from fastrot.data.stage import of_config

    def manifest(key: str, source: str | None) -> Manifest:
        if ranks is None:
            return Manifest.load(in_cache(of_config(source, config.data.stage, key), config.data.max_pixels, key))
        from fastrot.data.build import open_manifest

        return open_manifest(source, config, ranks, key)

    first = ranks is None or ranks.first
    rows = {}
    for key, source in data:
        found = manifest(key, source)
        rows[key] = len(found)
        if first:
            describe(found, terminal.console().print)
    if first:
        terminal.table("config", table(config, sources))
        images = [(key, f"{source}: {rows[key]:,} images") for key, source in data]
        terminal.table("dry run: nothing was written", images + does)
    return {"rows": rows, **dict(does), "config": flat(config), "sources": sources}
