"""What does it cost a step to time its stages and collectives, and to find what bounds it and which rank is slow?"""

import statistics
import time

import harness
import numpy as np
import torch
from step import MEAN, STD, resident

from fastrot import distributed
from fastrot.data.loader import MicroBatch, StepBatch
from fastrot.engine import StepSettings
from fastrot.engine.optimizers import build_optimizer
from fastrot.engine.plain import PlainEngine
from fastrot.profiling.clock import SPANS, Clock, communicating
from fastrot.profiling.pace import Pace
from fastrot.profiling.roofline import Work
from fastrot.runs.loop import Course, run
from fastrot.tasks.rotation import RotationTask

NORMS = 53  # as many as ResNet-50 has
STEPS_S = {"ResNet-50, 64 images on a GPU, about": 0.07, "bench/results/step_cpu, base": 0.234}
LINE = 50  # steps, as run.log_every
GATHERS = 500


class Silent(Clock):
    """Knows only how long a line took: its stages are contexts that do nothing."""

    def stage(self, name):
        return self

    def __enter__(self): ...

    def __exit__(self, *_): ...

    def waiting(self, items):
        return iter(items)

    def end_step(self): ...

    def read(self):
        Clock.end_step(self)
        return Clock.read(self)


class Sampled(Clock):
    """A GPU's way, but for its events: norms are timed where a line is due."""

    def _times(self, stage):
        return self._watched or stage != "compute"


class Lines:
    """In place of a run's log: the losses."""

    def __init__(self):
        self.losses = []

    def tick(self): ...

    def write(self, values):
        self.losses.append(values["loss"])


class Norm(torch.nn.Module):
    """Communicates nothing, forward and backward: what is left is the clock's part."""

    def forward(self, x):
        communicating(torch.cuda.is_available)
        communicating(torch.cuda.is_available)
        return x


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    norms = [Norm() for _ in range(NORMS)]
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 8, 8), *norms, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 4)
    )


def gathering(engine: PlainEngine) -> float:
    """Seconds of one gather of the ranks' reports, where a sum over ranks has gone before."""
    numbers, spent = Pace().report([dict.fromkeys(SPANS, 1.0)], 0).numbers(), []
    for _ in range(GATHERS):
        engine.reduce(torch.zeros(1))
        began = time.perf_counter()
        engine.gather(numbers)
        spent.append(time.perf_counter() - began)
    return statistics.median(spent)


def cost(timed: list[float], bare: list[float], gather_s: float) -> dict:
    """What a step costs in all, and the share that this is of real steps."""
    low, median, high = statistics.quantiles([a - b for a, b in zip(timed, bare, strict=True)], n=4)
    in_all = median + gather_s / LINE
    shares = {name: {"step_s": step_s, "share": in_all / step_s} for name, step_s in STEPS_S.items()}
    return {"us": in_all * 1e6, "clock_quartiles_us": [low * 1e6, high * 1e6], "share_of": shares}


def main() -> None:
    parser = harness.parser(__doc__)
    arguments = parser.parse_args()
    ranks = distributed.start()
    task = RotationTask(MEAN, STD, torch.float32, ranks.device, channels=3)
    model = network().to(ranks.device)
    optimizer = build_optimizer(
        "sgd", model, lr=0.0, momentum=0.9, nesterov=False, weight_decay=0.0, decay_norms=True, trust=0.001, fused=True
    )
    engine = PlainEngine(model, optimizer, StepSettings("fp32", 0, None, 0.9), ranks)
    gather_s = gathering(engine)
    engine.gather = lambda values: [values]  # measured by itself: gloo's own spread is larger than the rest
    pixels, images = resident(2, 32, ranks), 2 * ranks.world
    turns = torch.arange(4, dtype=torch.uint8).repeat(2, 1)
    flips = torch.zeros(2, dtype=torch.uint8)
    micro = MicroBatch(pixels, flips, turns, None, np.zeros(2), 4 * images, last=True).to(ranks.device)
    hosts = tuple(peer.host for peer in ranks.peers)
    course = Course(LINE, 10**9, images, 4, LINE, 10**9, 1, None, 0, ranks.rank, hosts, 10)
    clocks = {"timed": Clock(ranks.device), "not timed": Silent(ranks.device)}
    if ranks.device.type == "cpu":
        clocks["timed as on a GPU"] = Sampled(ranks.device)
    losses = {name: [] for name in clocks}

    def line(name: str) -> float:
        """Seconds of a step, of a line's."""
        batches = (StepBatch(step, step * images, 0.0, iter([micro])) for step in range(LINE))
        log, began = Lines(), time.perf_counter()
        work = Work(1, 1, 1.0, 1.0)
        parts = (course, batches, task, engine, lambda _: 0.0, lambda _: work, None, lambda *_: None, log)
        run(*parts, clocks[name], lambda: 0)
        losses[name] += log.losses
        return (time.perf_counter() - began) / LINE

    seconds = {name: [] for name in clocks}
    for number in range(arguments.rounds + 1):
        for name in clocks if number % 2 else reversed(list(clocks)):
            spent = line(name)
            if number:
                seconds[name].append(spent)
    bare = "not timed"
    harness.gate(all(one == losses[bare] for one in losses.values()), "the losses are the same with and without")
    costs = {name: cost(seconds[name], seconds[bare], gather_s) for name in clocks if name != bare}
    if ranks.first:
        result = {
            "facts": harness.facts() | {"ranks": ranks.world, "device": ranks.device.type, "norms": NORMS},
            "step_s": {name: harness.spread(values, "_s") for name, values in seconds.items()},
            "gather_us_a_line": gather_s * 1e6,
            "cost_a_step": costs,
        }
        harness.write(arguments.out, __doc__, result)
    distributed.end()


if __name__ == "__main__":
    main()
