"""`fastrot tune`: the loader's settings for this machine and data."""

import argparse

from fastrot.commands.base import Command, Result, add_config, add_dry_run, among_ranks, plan, settings


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seconds", type=float, default=3, metavar="S", help="seconds of timing a setting (default: 3)"
    )
    parser.add_argument(
        "--images-per-s",
        type=float,
        metavar="N",
        help="images/s of all ranks that the training takes, as its log says: on a GPU, find the largest share of the "
        "hardware decoder that keeps up, which leaves the step the most (default: the share stays 0.99)",
    )
    add_dry_run(parser)
    add_config(parser, "data", "rotation", "model", "optim", "engine", "run")


def _run(args: argparse.Namespace) -> Result:
    config, sources = settings(args)
    with among_ranks() as ranks:
        if args.dry_run:
            from fastrot.data.loader_settings import place

            kept = str(place(config.data, ranks))
            return plan(
                config, sources, ranks, [("data.train", config.data.train)], [("would keep its choice in", kept)]
            )
        from fastrot.runs.tune import tune

        return tune(config, ranks, args.seconds, args.images_per_s)


COMMAND = Command(
    "tune",
    "find threads, prefetch and the hardware decoder's share for this machine and data",
    "fastrot tune --config configs/in1k.yaml data.train=/data/train",
    _options,
    _run,
    "Time the loader at several settings, choose, say why, and keep the choice in the cache: training uses it where "
    "data.threads, data.prefetch and data.hw_decoder_load are not set. Start it as the training will be started (its "
    "launcher and ranks): ranks share a machine's cores. The stream does not depend on it.",
)
