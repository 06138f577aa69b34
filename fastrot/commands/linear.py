"""`fastrot linear`: linear heads on a frozen backbone, or on stored features."""

import argparse

from fastrot.commands.base import (
    Command,
    Result,
    add_fit,
    add_learning,
    among_ranks,
    settings,
)
from fastrot.errors import UserError


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--features", metavar="DIR", help="feature store to fit")
    parser.add_argument("--test", metavar="DIR", help="feature store to judge by")
    parser.add_argument(
        "--epochs", type=int, default=20, metavar="N", help="passes over the stored features (default: 20)"
    )
    add_fit(parser)
    add_learning(parser, "linear")


def _run(args: argparse.Namespace) -> Result:
    begins = (args.checkpoint, args.random_init, args.features)
    if sum(one is not None for one in begins) != 1:
        raise UserError("name either --checkpoint C or --random-init SEED, or --features TRAIN with --test TEST")
    if args.features is not None:
        return _on_features(args)
    config, sources = settings(args, "linear")
    with among_ranks() as ranks:
        from fastrot.runs.heads import prepared

        learning = prepared(args.checkpoint, args.random_init, config, ranks)
        return learning.dry_run(sources, ranks) if args.dry_run else learning.train(ranks, args.resume)


def _on_features(args: argparse.Namespace) -> Result:
    if args.test is None:
        raise UserError("--features: name the store to judge by, --test TEST")
    if args.dry_run:
        raise UserError("--dry-run: is for training from a --checkpoint; --features reads what is there")
    if args.config or args.overrides:
        raise UserError("--features: a grid on stored features reads no config; leave --config and overrides out")
    from fastrot.report import probing

    return probing.run(
        probing.PROBES["linear"], args.features, args.test, args.layers, args.out, args.device, epochs=args.epochs
    )


COMMAND = Command(
    "linear",
    "linear heads on a frozen backbone; or, fast, on stored features",
    "fastrot linear --checkpoint runs/in1k --config configs/linear_in1k.yaml data.train=/data/train data.val=/data/val",
    _options,
    _run,
    "With --checkpoint: the protocol's heads on data.train, augmented, judged on data.val, in run.out. "
    "With --features: a grid of rates and decays at once on stored features, which is not the protocol.",
)
