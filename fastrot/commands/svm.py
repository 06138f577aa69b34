"""`fastrot svm`: VOC07's linear SVMs."""

import argparse

from fastrot.commands.base import Command, Result, add_stores


def _run(args: argparse.Namespace) -> Result:
    from fastrot.report import probing

    return probing.run(probing.PROBES["svm"], args.train, args.test, args.layers, args.out, args.device)


COMMAND = Command(
    "svm",
    "VOC07's linear SVMs on features",
    "fastrot svm --train features/voc07-train --test features/voc07-test --layers feature4,feature5 --out svm.json",
    add_stores,
    _run,
)
