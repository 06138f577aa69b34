"""`fastrot export`: a backbone for another library."""

import argparse

from fastrot.commands.base import STORE, Command, Result, add_json


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="C", help=STORE)
    parser.add_argument(
        "--to",
        required=True,
        choices=("torchvision", "timm", "detectron2", "mmdetection", "mmpretrain"),
        help="whose key names the file has",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="ends in .safetensors or .pth; the card in .md")
    add_json(parser)


def _run(args: argparse.Namespace) -> Result:
    from fastrot.models.export import export

    return export(args.checkpoint, args.to, args.out)


COMMAND = Command(
    "export",
    "write a backbone under another library's key names, with a card",
    "fastrot export --checkpoint runs/in1k --to detectron2 --out rotation_r50_d2.pth",
    _options,
    _run,
)
