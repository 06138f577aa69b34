"""`fastrot features`: a frozen backbone's taps in a store."""

import argparse

from fastrot.commands.base import Command, Result, add_backbone, add_config, add_dry_run, among_ranks, plan, settings


def _options(parser: argparse.ArgumentParser) -> None:
    add_backbone(parser)
    parser.add_argument("--data", required=True, metavar="SOURCE", help="a folder, list:FILE, shards, voc:ROOT?split=S")
    parser.add_argument("--taps", default="1,2,3,4,5", metavar="LIST", help="of 1,2,3,4,5,avg (default: 1,2,3,4,5)")
    parser.add_argument(
        "--pool",
        choices=("specified", "gap", "adaptive"),
        default="specified",
        help="specified: the protocol's, for crops of 224 (default); gap: the global average; "
        "adaptive: the protocol's sizes for any crop",
    )
    parser.add_argument(
        "--transform",
        choices=("test", "svm"),
        default="test",
        help="test: short side 256, centre 224 (default); svm: short side 256, then squashed to 224; pixels",
    )
    parser.add_argument(
        "--passes",
        type=int,
        metavar="N",
        help="N passes with the plan's random windows and flips, epoch = pass, instead of one as evaluation shows images",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="of the stored numbers (default: float32)",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the feature store; one that was begun goes on")
    add_dry_run(parser)
    add_config(parser, "data", "rotation", "model", "engine", "run")


def _run(args: argparse.Namespace) -> Result:
    config, sources = settings(args)
    with among_ranks() as ranks:
        from fastrot.features import extract

        taps = extract.parse_taps(args.taps)
        if args.dry_run:
            does = [("taps", ", ".join(taps)), ("would write", args.out)]
            return plan(config, sources, ranks, [("--data", args.data)], does)
        request = extract.Request(
            args.data,
            args.out,
            args.checkpoint,
            args.random_init,
            taps,
            args.pool,
            args.transform,
            args.dtype,
            args.passes,
        )
        return extract.dump(request, config, ranks)


COMMAND = Command(
    "features",
    "a frozen backbone's taps over a source, into a store",
    "fastrot features --checkpoint runs/in1k --data /data/val --taps 1,2,3,4,5,avg --out features/val",
    _options,
    _run,
)
