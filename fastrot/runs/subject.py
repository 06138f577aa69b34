"""What is profiled: the data path, the step and both together of one config, each in laps."""

import itertools
import statistics
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, record_function

from fastrot.config import Config
from fastrot.data.build import crop_at, make_loader, settings_of, short_side
from fastrot.data.loader import IN_FLIGHT, MicroBatch, StepBatch
from fastrot.data.manifest import Manifest
from fastrot.distributed import Ranks
from fastrot.engine.graphs import WARM_UPS
from fastrot.errors import UserError
from fastrot.features.extract import BLOCK, Extractor
from fastrot.models.backbone import random_backbone
from fastrot.profiling.clock import Clock, Spans
from fastrot.profiling.kernels import of_profiler
from fastrot.profiling.layers import Stopwatch, groups
from fastrot.profiling.marks import Mark, between, mark, memory_gib
from fastrot.profiling.roofline import Work
from fastrot.profiling.stages import LAPS, ceiling
from fastrot.profiling.verdict import Ceiling
from fastrot.runs.build import Job
from fastrot.runs.loop import run

_MOST = 10**6  # steps, more than any lap has
_TRACED = 3  # steps
_PACED = 3  # steps that tell how long a lap must be
_SHOWN = 6  # steps of a timeline
_TIMED = 4  # steps of the groups of layers

Parts = dict[str, Any]
"""step_s, memory_gib, the share of each stage, and lists of them by lap."""


class Subject(Protocol):
    """took: seconds of each batch that `data` drew last."""

    took: list[float]

    def data(self, seconds: float) -> Ceiling:
        """The whole data path, drained as fast as it comes."""

    def step(self, seconds: float) -> tuple[Ceiling, Parts]:
        """On a step's images that are there already; and its stages."""

    def both(self, seconds: float, trace: Path | None = None) -> tuple[Ceiling, Parts]:
        """As in training; a few steps of it traced."""


class Laps:
    """In place of a run's log: the values of each line, processor time at its end, and the seconds of `forward`."""

    def __init__(self, forward: "_Forward | None") -> None:
        self.lines: list[dict[str, Any]] = []
        self.cpu: list[float] = []
        self._forward = forward

    def tick(self) -> None: ...

    def write(self, values: dict[str, Any]) -> None:
        self.lines.append(values | ({"forward_s": self._forward.read()} if self._forward else {}))
        self.cpu.append(process_time())


class _Forward:
    """A task's loss, timed."""

    def __init__(self, loss: Callable[..., Any]):
        self._loss, self._spans = loss, list[tuple[Mark, Mark]]()

    def __call__(self, *arguments: Any) -> Any:
        begin = mark()
        out = self._loss(*arguments)
        self._spans.append((begin, mark()))
        return out

    def read(self) -> float:
        """Seconds since the last read."""
        seconds = sum(between(*span) for span in self._spans)
        self._spans.clear()
        return seconds


@dataclass
class Training:
    """A job's. make: as Job is called."""

    make: Callable[..., Job]
    config: Config
    ranks: Ranks
    manifest: Manifest
    took: list[float] = field(default_factory=list)

    def _job(self) -> Job:
        return self.make(self.config, self.ranks, self.manifest, None, None, None, lambda line: None)

    def data(self, seconds: float) -> Ceiling:
        job, self.took = self._job(), []
        images = job.numbers.images / (self.ranks.world * job.numbers.micro_steps)
        try:
            with closing(job.batches(range(_MOST), 0)) as steps:
                micro = (batch for step in steps for batch in step.micro_steps)
                return ceiling(lambda: images if next(micro) else 0, seconds, self.took)
        finally:
            job.close()

    def step(self, seconds: float) -> tuple[Ceiling, Parts]:
        return self._trained(seconds, resident=True, trace=None)

    def both(self, seconds: float, trace: Path | None = None) -> tuple[Ceiling, Parts]:
        return self._trained(seconds, resident=False, trace=trace)

    def layers(self) -> dict[str, Any]:
        """Groups of layers beside this device's rates; none where they are not computed one by one, or nobody counted
        what they compute."""
        job, engine = self._job(), self.config.engine
        try:
            rows = job.step_rows(crop_at(self.config, 0))
            if not rows or engine.compile or engine.recompute or job.engine.cuda_graphs:
                return {}
            stopwatch = Stopwatch(job.engine.model)
            vars(job.engine)["backward"] = stopwatch.timed(job.engine.backward)
            with closing(job.batches(range(_MOST), 0)) as batches:
                steps = again_and_again(job, next(batches))
                run_laps(job, steps, 2, 1, _Forward(job.task.loss))
                stopwatch.read()
                line = run_laps(job, steps, _TIMED, _TIMED, _Forward(job.task.loss)).lines[-1]
            stopwatch.close()
        finally:
            job.close()
        seconds = {name: spent / _TIMED for name, spent in stopwatch.read().items()}
        seconds |= {"views": line["rotate_share"] * line["step_s"], "update": line["update_share"] * line["step_s"]}
        found = groups(rows, job.rates, seconds)
        return {**asdict(job.rates), "groups": [asdict(one) for one in found]}

    def _trained(self, seconds: float, resident: bool, trace: Path | None) -> tuple[Ceiling, Parts]:
        job = self._job()
        try:
            with closing(job.batches(range(_MOST), 0)) as batches:
                steps = again_and_again(job, next(batches)) if resident else batches
                ready = 0 if resident else settings_of(self.config, self.ranks).prefetch + IN_FLIGHT
                return _timed(job, steps, seconds, ready, trace)
        finally:
            job.close()


def again_and_again(job: Job, first: StepBatch) -> Iterator[StepBatch]:
    """A step's images, resident, without end."""
    micro = [batch.to(job.ranks.device) for batch in first.micro_steps]
    return (replace(first, step=at, micro_steps=iter(micro)) for at, _ in enumerate(itertools.repeat(None)))


def _timed(
    job: Job, steps: Iterator[StepBatch], seconds: float, ready: int, trace: Path | None
) -> tuple[Ceiling, Parts]:
    """Laps of the loop itself at rate 0: the weights stay, a step costs the same. ready: steps that may be loaded before
    there is one to train on: they are thrown away, or a slow data path would look fast."""
    forward = _Forward(job.task.loss)
    if not job.engine.cuda_graphs:  # where it is called once
        vars(job.task)["loss"] = forward
    run_laps(job, steps, WARM_UPS, WARM_UPS, forward)
    for batch in itertools.islice(steps, ready):
        deque(batch.micro_steps, maxlen=0)
    step_s = statistics.fmean(line["step_s"] for line in run_laps(job, steps, _PACED, 1, forward).lines)
    lap = max(2, round(seconds / LAPS / step_s))
    if job.ranks.world > 1:  # the ranks must agree
        agreed = torch.tensor([lap], device=job.ranks.device)
        dist.all_reduce(agreed, dist.ReduceOp.MIN)
        lap = int(agreed)
    gpu: dict[str, float] = {}
    if trace is not None or job.ranks.device.type == "cuda":
        with _profiler(job.ranks, trace, gpu):
            run_laps(job, steps, _TRACED, _TRACED, forward, _Ranges(job.ranks.device))
    timeline = _Timeline(job.ranks.device)
    run_laps(job, steps, _SHOWN, _SHOWN, forward, timeline)
    laps = run_laps(job, steps, lap * (LAPS + 1), lap, forward)
    images = lap * job.numbers.images / job.ranks.world
    cpus = [(end - begin) / images for begin, end in itertools.pairwise(laps.cpu)]
    lines = laps.lines[1:]
    paces = [line["images_per_s"] / job.ranks.world for line in lines]
    return Ceiling(paces, cpus), _parts(lines, lap) | {"timeline": timeline.spans, "gpu": gpu}


def _parts(lines: list[dict[str, Any]], lap: int) -> Parts:
    by_lap = {name: [line[name] for line in lines] for name in lines[0] if name.endswith("_share") or name == "step_s"}
    means = {name: statistics.fmean(values) for name, values in by_lap.items()}
    forward = statistics.fmean(line["forward_s"] for line in lines) / lap / means["step_s"]
    split = {"forward_share": forward, "backward_share": means["compute_share"] - forward} if forward else {}
    return {**means, **split, "memory_gib": lines[-1]["memory_gib"], "laps": by_lap}


def run_laps(
    job: Job,
    steps: Iterator[StepBatch],
    count: int,
    log_every: int,
    forward: _Forward | None = None,
    clock: Clock | None = None,
) -> Laps:
    """The loop itself over `count` steps, a lap each `log_every`, at rate 0: the weights stay, a step costs the same."""
    laps = Laps(forward)
    batches = (replace(batch, step=at) for at, batch in enumerate(itertools.islice(steps, count)))
    course = replace(job.course(count), log_every=log_every, checkpoint_every=_MOST)
    nothing: Callable[..., None] = lambda *_: None  # noqa: E731
    run(
        course,
        batches,
        job.task,
        job.engine,
        lambda _: 0.0,
        lambda _: Work(),
        None,
        nothing,
        laps,
        clock or job.clock,
        lambda: 0,
    )
    return laps


@contextmanager
def _profiler(ranks: Ranks, trace: Path | None, gpu: dict[str, float]) -> Iterator[None]:
    """What runs inside as Chrome and Perfetto read it; and what a GPU does of it."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    with torch.profiler.profile(activities=activities) as profiler:
        yield
    gpu |= of_profiler(profiler)
    if trace is not None and ranks.first:
        try:
            profiler.export_chrome_trace(str(trace))
        except (OSError, RuntimeError) as error:
            raise UserError(f"--trace {trace}: cannot be written ({error})") from None


class _Timeline(Clock):
    """Keeps when the stages of each step were, in seconds from the first."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.spans: list[tuple[str, float, float]] = []

    def read(self) -> list[Spans]:
        kept = [span for spans, _, _ in self._steps for span in spans]
        seconds = super().read()
        self.spans = [
            (one.name, self._between(kept[0].begin, one.begin), self._between(kept[0].begin, one.end)) for one in kept
        ]
        return seconds


class _Ranges(Clock):
    """Stages as ranges of a trace, and of NVTX where there is a GPU."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        nvtx = torch.cuda.nvtx.range(name) if torch.cuda.is_available() else nullcontext()
        with record_function(name), nvtx, super().stage(name):
            yield


@dataclass
class Extracting:
    """`fastrot features`: a backbone's taps, those of the config's `linear`, over images as evaluation shows them."""

    config: Config
    ranks: Ranks
    manifest: Manifest
    took: list[float] = field(default_factory=list)

    def data(self, seconds: float) -> Ceiling:
        self.took = []
        with self._batches() as batches:
            return ceiling(lambda: len(next(batches).pixels), seconds, self.took)

    def step(self, seconds: float) -> tuple[Ceiling, Parts]:
        extract = self._extractor()
        with self._batches() as batches:
            batch = next(batches).to(self.ranks.device)
        found = ceiling(lambda: _taken(extract, batch), seconds)
        return found, {
            "step_s": len(batch.pixels) / found.pace,
            "wait_share": 0.0,
            "host_share": 0.0,
            "memory_gib": memory_gib(),
        }

    def both(self, seconds: float, trace: Path | None = None) -> tuple[Ceiling, Parts]:
        extract, waited = self._extractor(), list[float]()
        with self._batches() as batches:

            def work() -> int:
                began = perf_counter()
                batch = next(batches)
                waited.append(perf_counter() - began)
                return _taken(extract, batch)

            if trace is not None:
                with _profiler(self.ranks, trace, {}):
                    for _ in range(_TRACED):
                        work()
            took: list[float] = []
            found = ceiling(work, seconds, took)
        share = sum(waited[-len(took) :]) / sum(took)
        return found, {"step_s": statistics.fmean(took), "wait_share": share, "memory_gib": memory_gib()}

    def _extractor(self) -> Extractor:
        config = self.config
        model, _ = random_backbone(config.model.arch, config.run.seed)
        return Extractor(model, config, self.ranks.device, config.linear.taps, config.linear.pool)

    @contextmanager
    def _batches(self) -> Iterator[Iterator[MicroBatch]]:
        config, rows = self.config, len(self.manifest)
        block = min(config.engine.images_per_micro_step or BLOCK, rows)
        parts = (np.arange(at, at + block) % rows for at in itertools.count(self.ranks.rank * block, block))
        loader, _ = make_loader(config, self.manifest, self.ranks, block, None)
        try:
            with closing(loader.shown(parts, short_side(config), config.data.crop)) as batches:
                yield batches
        finally:
            loader.close()


def _taken(extract: Extractor, batch: MicroBatch) -> int:
    for tap in extract(batch.pixels, batch.flips).values():
        tap.cpu()
    return len(batch.pixels)
