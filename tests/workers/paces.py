"""A training on ranks whose clocks go by what is planted: one second of work each, rank 1 with two more in every step,
rank 0 with twenty more in one."""

import os
from types import SimpleNamespace

from fastrot.cli import main
from fastrot.data.loader import MicroBatch
from fastrot.engine.base import Engine
from fastrot.profiling import clock as clocks
from fastrot.tasks.rotation import RotationTask

SLOW = 15  # the step


def train(words: list[str]) -> int:
    rank, now = int(os.environ["RANK"]), SimpleNamespace(seconds=0.0, step=-1)
    clocks.time = SimpleNamespace(perf_counter=lambda: now.seconds)

    def takes(method, seconds):
        def call(*arguments, **options):
            now.seconds += seconds()
            return method(*arguments, **options)

        return call

    def copy() -> float:
        now.step += 1
        return 20.0 if (rank, now.step) == (0, SLOW) else 0.0

    def waits() -> float:
        if now.step == SLOW:
            return 18.0 if rank else 0.0
        return 0.0 if rank else 2.0

    MicroBatch.to = takes(MicroBatch.to, copy)
    RotationTask.views = takes(RotationTask.views, lambda: 2.0 if rank else 0.0)
    RotationTask.loss = takes(RotationTask.loss, lambda: 1.0)
    Engine._average = takes(Engine._average, waits)
    return main(words)
