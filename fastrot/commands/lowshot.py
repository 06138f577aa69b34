"""`fastrot lowshot`: VOC07's low-shot SVMs."""

import argparse

from fastrot.commands.base import Command, Result, add_stores, numbers


def _options(parser: argparse.ArgumentParser) -> None:
    add_stores(parser)
    parser.add_argument(
        "--k",
        type=numbers,
        default=[1, 2, 4, 8, 16, 32, 64, 96],
        metavar="K,K",
        help="positives a class (default: 1,2,4,8,16,32,64,96)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="SEED", help="of the five draws (default: 0)")
    parser.add_argument(
        "--draws", metavar="DIR", help="published draws, train_targets_sample1_k1.npy and so on, instead"
    )


def _run(args: argparse.Namespace) -> Result:
    from fastrot.report import probing

    options = {"ks": args.k, "seed": args.seed, "draws": args.draws}
    return probing.run(probing.PROBES["lowshot"], args.train, args.test, args.layers, args.out, args.device, **options)


COMMAND = Command(
    "lowshot",
    "VOC07's low-shot SVMs on features",
    "fastrot lowshot --train features/voc07-train --test features/voc07-test --k 1,2,4,8 --out lowshot.json",
    _options,
    _run,
)
