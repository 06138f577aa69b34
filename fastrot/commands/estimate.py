"""`fastrot estimate`: what a training would take on machines that are not there."""

import argparse
from pathlib import Path

from fastrot.commands.base import Command, Result, add_config, numbers, settings


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--nodes", type=numbers, default=[1], metavar="N,N", help="nodes, or several numbers of them (default: 1)"
    )
    parser.add_argument("--gpus-per-node", type=int, metavar="G", help="default: as the hardware file says")
    parser.add_argument(
        "--hardware", default="h100", metavar="NAME|FILE", help="a100, h100, h200, b200, or a YAML file (default: h100)"
    )
    parser.add_argument(
        "--images", type=int, default=1_281_167, metavar="N", help="of the data set (default: ImageNet's)"
    )
    parser.add_argument(
        "--image-kib", type=float, default=110, metavar="KIB", help="of a file, in the mean (default: 110)"
    )
    parser.add_argument(
        "--from", type=Path, dest="profile", metavar="FILE", help="what fastrot profile --json printed of one process"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the plans there too, as one page")
    add_config(parser, "data", "rotation", "model", "optim", "engine")


def _run(args: argparse.Namespace) -> Result:
    from fastrot.errors import UserError

    if args.gpus_per_node is not None and args.gpus_per_node < 1:
        raise UserError(f"--gpus-per-node {args.gpus_per_node}: must be 1 or more")
    if args.images < 1 or not args.image_kib > 0:
        raise UserError(f"--images {args.images} of --image-kib {args.image_kib:g}: both must be above 0")
    config, _ = settings(args)
    from fastrot.runs.estimate import estimate

    result = estimate(config, args.nodes, args.gpus_per_node, args.hardware, args.images, args.image_kib, args.profile)
    if args.html:
        from fastrot.report.plans import write

        write(args.html, result)
    return result


COMMAND = Command(
    "estimate",
    "what a training would take on machines that are not there: hours, GPU-hours, what bounds it, where it stops scaling",
    "fastrot estimate --config configs/in1k.yaml --hardware h100 --nodes 1,2,16,128",
    _options,
    _run,
    "Arithmetic over a hardware file, in which every number says whether it was measured, is from a data sheet or "
    "assumed, and how far it may be off: a step by the roofline or (--from) as profiled, gradients and synchronised "
    "norms by latency and bandwidth, storage and decoders, memory, checkpoints, failures. Nothing is trained; --html alone "
    "writes a file.",
)
