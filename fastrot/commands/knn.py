"""`fastrot knn`: nearest neighbours."""

import argparse

from fastrot.commands.base import Command, Result, add_stores, numbers


def _options(parser: argparse.ArgumentParser) -> None:
    add_stores(parser)
    parser.add_argument(
        "--k", type=numbers, default=[10, 20, 100, 200], metavar="K,K", help="neighbours (default: 10,20,100,200)"
    )


def _run(args: argparse.Namespace) -> Result:
    from fastrot.report import probing

    return probing.run(probing.PROBES["knn"], args.train, args.test, args.layers, args.out, args.device, ks=args.k)


COMMAND = Command(
    "knn",
    "weighted k-nearest-neighbour classification of features",
    "fastrot knn --train features/photos-train --test features/photos-val --layers avg --k 10,20",
    _options,
    _run,
)
