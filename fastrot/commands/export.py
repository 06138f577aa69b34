"""`fastrot export`: a network for another library, or for none."""

import argparse

from fastrot.commands.base import STORE, Command, Result, add_json
from fastrot.errors import UserError

_LIBRARIES = ("torchvision", "timm", "detectron2", "mmdetection", "mmpretrain")
_PROGRAMS = ("onnx", "pt2")


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="C", help=STORE)
    parser.add_argument(
        "--to",
        required=True,
        choices=(*_LIBRARIES, *_PROGRAMS),
        help="whose key names the file has; or onnx, pt2 (of torch.export): the network itself, which needs no fastrot",
    )
    parser.add_argument(
        "--head",
        action="store_true",
        help="onnx and pt2: with the head that tells the four turns apart, for fastrot orient; C is then a run of "
        "fastrot train or one of its checkpoints",
    )
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="ends in .safetensors or .pth, in .onnx, in .pt2; the card in .md"
    )
    add_json(parser)


def _run(args: argparse.Namespace) -> Result:
    if args.to in _PROGRAMS:
        from fastrot.orient.export import export as export_program

        return export_program(args.checkpoint, args.to, args.out, args.head)
    if args.head:
        raise UserError(f"--head: {args.to} reads backbones alone; --to onnx and pt2 keep the head")
    from fastrot.models.export import export

    return export(args.checkpoint, args.to, args.out)


COMMAND = Command(
    "export",
    "write a backbone under another library's key names, or a network as ONNX, with a card",
    "fastrot export --checkpoint runs/in1k --to detectron2 --out rotation_r50_d2.pth\n"
    "  fastrot export --checkpoint runs/orient --to onnx --head --out orient.onnx",
    _options,
    _run,
)
