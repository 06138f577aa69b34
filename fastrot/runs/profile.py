"""`fastrot profile`: each stage of a training by itself, what bounds it, what a cure would give, and whether it did."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity

from fastrot import machine, terminal
from fastrot.config import Config, flat, from_values
from fastrot.data.build import crop_at, decoder_of, make_loader, open_manifest, plan_of, settings_of
from fastrot.data.loader import DECODES_IN_FLIGHT, StepBatch
from fastrot.data.loader_settings import thread_counts
from fastrot.data.manifest import Manifest
from fastrot.data.remarks import describe
from fastrot.distributed import Ranks
from fastrot.engine.graphs import WARM_UPS
from fastrot.errors import UserError
from fastrot.profiling.roofline import Work
from fastrot.profiling.stages import LAPS, ceiling, decoding, reading
from fastrot.profiling.verdict import Ceiling, Stages, Verdict, held, judge
from fastrot.runs.arithmetic import arithmetic
from fastrot.runs.build import Job, set_torch_flags
from fastrot.runs.loop import run

_SHARES = {"cold": 1, "warm": 1, "decode": 2, "data": 3, "step": 4, "both": 4, "candidates": 8}  # of the seconds
_MOST = 10**6  # steps, more than any lap has
_TRACED = 3  # steps
_SLOW = 1.2  # times the median: a rank to name

Interval = tuple[float, float, float]


class _Laps:
    """In place of a run's log: pace, processor time and stages of each line."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.cpu: list[float] = []

    def tick(self) -> None: ...

    def write(self, values: dict[str, Any]) -> None:
        self.lines.append(dict(values))
        self.cpu.append(time.process_time())


@dataclass(frozen=True)
class Cure:
    """A setting, the pace it is predicted to give over the present one, and what it gave where it was tried: both
    (lowest, median, highest)."""

    setting: str
    predicted: Interval
    achieved: Interval | None = None


@dataclass(frozen=True)
class _Bench:
    """The parts of a training under one config, and how long a unit of time is."""

    config: Config
    ranks: Ranks
    manifest: Manifest
    unit: float

    def data(self) -> Ceiling:
        """The whole data path, drained as fast as it comes."""
        n = arithmetic(self.config, self.ranks.world, len(self.manifest))
        loader, _ = make_loader(self.config, self.manifest, self.ranks, n.largest, None)
        crop = partial(crop_at, self.config)
        steps = loader.train(range(_MOST), 0, n.images, n.ranks, self.ranks.rank, n.micro_steps, crop)
        micro = (batch for step in steps for batch in step.micro_steps)
        try:
            return ceiling(lambda: len(next(micro).pixels), _SHARES["data"] * self.unit)
        finally:
            steps.close()
            loader.close()

    def step(self) -> tuple[Ceiling, dict[str, Any]]:
        """On a step's images that are there already; and its stages."""
        return self._trained("step")

    def both(self, trace: Path | None = None) -> tuple[Ceiling, dict[str, Any]]:
        """As in training."""
        return self._trained("both", trace)

    def _trained(self, what: str, trace: Path | None = None) -> tuple[Ceiling, dict[str, Any]]:
        job = Job(self.config, self.ranks, self.manifest, None, None, None, lambda line: None)
        try:
            with closing(job.batches(range(_MOST), 0)) as batches:
                steps = _again_and_again(job, next(batches)) if what == "step" else batches
                return _timed(job, steps, _SHARES[what] * self.unit, trace)
        finally:
            job.close()


def _again_and_again(job: Job, first: StepBatch) -> Iterator[StepBatch]:
    micro = [batch.to(job.ranks.device) for batch in first.micro_steps]
    return (replace(first, step=at, micro_steps=iter(micro)) for at, _ in enumerate(repeat(None)))


def _timed(job: Job, steps: Iterator[StepBatch], seconds: float, trace: Path | None) -> tuple[Ceiling, dict[str, Any]]:
    """Laps of the loop itself at rate 0: the weights stay, a step costs the same."""
    warm = _run(job, steps, WARM_UPS + 2, 1)
    step_s = min(line["step_s"] for line in warm.lines[WARM_UPS:])
    lap = max(1, round(seconds / LAPS / step_s))
    if job.ranks.world > 1:  # the ranks must agree
        agreed = torch.tensor([lap], device=job.ranks.device)
        dist.all_reduce(agreed, dist.ReduceOp.MIN)
        lap = int(agreed)
    if trace is not None:
        _traced(job, steps, trace)
    laps = _run(job, steps, lap * (LAPS + 1), lap)
    images = lap * job.numbers.images / job.ranks.world
    cpu = (laps.cpu[-1] - laps.cpu[0]) / (images * LAPS)
    lines = laps.lines[1:]
    paces = [line["images_per_s"] / job.ranks.world for line in lines]
    shares = {name: _mean(lines, name) for name in lines[0] if name.endswith("_share")}
    return Ceiling(paces, cpu), {"step_s": _mean(lines, "step_s"), "memory_gib": lines[-1]["memory_gib"], **shares}


def _mean(lines: list[dict[str, Any]], name: str) -> float:
    return statistics.fmean(line[name] for line in lines)


def _run(job: Job, steps: Iterator[StepBatch], count: int, log_every: int) -> _Laps:
    laps = _Laps()
    some = [None] * count
    batches = (replace(batch, step=at) for at, (batch, _) in enumerate(zip(steps, some, strict=False)))
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
        job.clock,
        lambda: 0,
    )
    return laps


def _traced(job: Job, steps: Iterator[StepBatch], trace: Path) -> None:
    """A few steps as Chrome and Perfetto read them."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    with torch.profiler.profile(activities=activities) as profiler:
        _run(job, steps, _TRACED, _TRACED)
    if job.ranks.first:
        profiler.export_chrome_trace(str(trace))


def profile(config: Config, ranks: Ranks, seconds: float, attempt: bool, trace: Path | None) -> dict[str, Any]:
    """Measure every stage, judge, propose; with `attempt` train with each proposal and say what it gave.

    seconds  of timing in all, about; setting up, warming up and compiling come on top.
    Raises UserError where there are no seconds, or the trace cannot be written.
    """
    if not seconds > 0:
        raise UserError(f"--seconds {seconds:g}: must be above 0")
    if trace is not None and not trace.parent.is_dir():
        raise UserError(f"--trace {trace}: {trace.parent} is no folder")
    set_torch_flags(config)
    manifest = open_manifest(config.data.train, config, ranks, "data.train")
    if ranks.first:
        describe(manifest, terminal.console().print)
    bench = _Bench(config, ranks, manifest, seconds / sum(_SHARES.values()))
    stages, parts = _measured(bench, trace)
    verdict = judge(stages)
    cures = _cures(bench, stages, verdict)
    if attempt:
        cures = [_tried(bench, cure) for cure in cures]
    slow = _slow_rank(ranks, parts["both"])
    result = {
        "stages": {name: asdict(one) | {"pace": one.pace} for name, one in _by_name(stages).items()},
        "cores": stages.cores,
        "parts_of_a_step": parts,
        "verdict": asdict(verdict),
        "says": _says(stages, verdict, parts["both"]),
        "cures": [asdict(cure) for cure in cures],
        "slow_rank": slow,
    }
    if ranks.first:
        _show(stages, result, cures)
    return result


def _by_name(stages: Stages) -> dict[str, Ceiling]:
    return {name: getattr(stages, name) for name in ("cold", "warm", "decode", "data", "step", "both")}


def _measured(bench: _Bench, trace: Path | None) -> tuple[Stages, dict[str, dict[str, Any]]]:
    config, ranks, manifest, unit = bench.config, bench.ranks, bench.manifest, bench.unit
    plan, settings = plan_of(config, manifest), settings_of(config, ranks)
    images = arithmetic(config, ranks.world, len(manifest)).largest
    decoder, _ = decoder_of(config, manifest, ranks, images, settings)
    parts: dict[str, dict[str, Any]] = {}

    def trained(what: str) -> Ceiling:
        found, parts[what] = bench.step() if what == "step" else bench.both(trace)
        return found

    works: dict[str, Callable[[], Ceiling]] = {
        "cold": lambda: reading(manifest, plan, images, unit, cold=True),
        "warm": lambda: reading(manifest, plan, images, unit, cold=False),
        "decode": lambda: decoding(manifest, plan, decoder, images, crop_at(config, 0), 2 * unit, DECODES_IN_FLIGHT),
        "data": bench.data,
        "step": lambda: trained("step"),
        "both": lambda: trained("both"),
    }
    shown = terminal.track(works.items(), len(works), "stages") if ranks.first else works.items()
    found = {name: work() for name, work in shown}
    decoder.close()
    return Stages(machine.cores() / ranks.local_world, **found), parts


def _cures(bench: _Bench, stages: Stages, verdict: Verdict) -> list[Cure]:
    """Settings that change what bounds the training, each measured alone; the best three that gain at all."""
    cures = []
    step = verdict.stage == "step"
    candidates = _of_the_step(bench) if step else _of_the_data_path(bench)
    shorter = replace(bench, unit=bench.unit / max(1, len(candidates)) * 2)
    shown = terminal.track(candidates, len(candidates), "settings") if bench.ranks.first else candidates
    for setting in shown:
        try:
            other = replace(shorter, config=_with(bench.config, setting))
            gain = stages.gain(step=other.step()[0]) if step else stages.gain(data=other.data())
        except UserError:  # what cannot run here is no proposal
            continue
        cures.append(Cure(setting, gain))
    better = [cure for cure in cures if cure.predicted[1] > 1.03]  # below it nobody could see it
    return sorted(better, key=lambda cure: -cure.predicted[1])[:3]


def _of_the_data_path(bench: _Bench) -> list[str]:
    config, now = bench.config, settings_of(bench.config, bench.ranks)
    out = [f"data.threads={n}" for n in thread_counts(bench.ranks.cores) if n > now.threads]
    if config.data.decode in ("auto", "turbo") and bench.ranks.device.type == "cpu":
        out.append("data.decode=turbo_fast")
    return out


def _of_the_step(bench: _Bench) -> list[str]:
    engine, on_gpu = bench.config.engine, bench.ranks.device.type == "cuda"
    other = "bf16" if engine.precision == "fp32" else "fp32"
    out = [f"engine.precision={other}"]
    if not engine.channels_last:
        out.append("engine.channels_last=true")
    if on_gpu:
        out += [f"engine.norm={norm}" for norm in ("fused", "fused_conv", "fused_chain") if norm != engine.norm]
        out += ["engine.cuda_graphs=auto"] if not engine.cuda_graphs else []
    return out


def _with(config: Config, setting: str) -> Config:
    key, _, value = setting.partition("=")
    return from_values(None, flat(config) | {key: value})


def _tried(bench: _Bench, cure: Cure) -> Cure:
    """Trained with it and without, in turns."""
    other = replace(bench, config=_with(bench.config, cure.setting))
    ratios: list[float] = []
    for _ in range(2):
        now, new = bench.both()[0], other.both()[0]
        ratios += [b / a for a, b in zip(now.paces, new.paces, strict=True)]
    ratios.sort()
    cut = len(ratios) // 5
    return replace(cure, achieved=(ratios[cut], ratios[len(ratios) // 2], ratios[-1 - cut]))


def _slow_rank(ranks: Ranks, both: dict[str, Any]) -> dict[str, Any] | None:
    """A rank whose own work takes much longer than the others': they wait for it in the update."""
    mine = both["step_s"] * (1 - both["wait_share"] - both["update_share"])
    everyone: list[Any] = [None] * ranks.world
    dist.all_gather_object(everyone, mine)
    median = sorted(everyone)[(len(everyone) - 1) // 2]
    worst = max(range(ranks.world), key=lambda rank: everyone[rank])
    if everyone[worst] < _SLOW * median:
        return None
    host = ranks.peers[worst].host if ranks.peers else ""
    return {"rank": worst, "host": host, "times_the_median": everyone[worst] / median}


_NAMES = {
    "cold": "reading from the disk",
    "warm": "reading from memory",
    "decode": "decoding",
    "data": "the data path",
    "step": "the step",
    "cores": "the processor's cores",
}


def _says(stages: Stages, verdict: Verdict, both: dict[str, Any]) -> str:
    """The verdict in words."""
    what = _NAMES[verdict.stage]
    if verdict.bound == "cores":
        data, step = stages.data.cpu_s, stages.step.cpu_s
        what = (
            f"the processor's cores, of whose time the step takes {step / (data + step):.0%} and the data path "
            f"{data / (data + step):.0%}"
        )
    noise = (
        "; more than its bound: this machine had other work, run it again when it is quiet"
        if verdict.reached > 1.1
        else ""
    )
    return (
        f"bound by {what}: {verdict.bound_pace:,.0f} images/s are the most, {stages.both.pace:,.0f} are reached "
        f"({verdict.reached:.0%}{noise}; {both['wait_share']:.0%} of a step waits for data). Without that, "
        f"{_NAMES[verdict.next]} would bound it at {verdict.next_pace:,.0f}"
    )


def _show(stages: Stages, result: dict[str, Any], cures: list[Cure]) -> None:
    rows = [
        (
            _NAMES.get(name, "training, both together"),
            f"{one.pace:,.0f} images/s ({min(one.paces):,.0f} to {max(one.paces):,.0f}), "
            f"{one.pace * one.cpu_s:.1f} cores busy",
        )
        for name, one in _by_name(stages).items()
    ]
    both = result["parts_of_a_step"]["both"]
    shares = ", ".join(f"{name.removesuffix('_share')} {both[name]:.0%}" for name in both if name.endswith("_share"))
    rows.append(("a step", f"{both['step_s']:.3f} s: {shares}; {both['memory_gib']:.1f} GiB"))
    terminal.table("alone, each", rows)
    told = [("bound", result["says"]), *(("try", _told(cure)) for cure in cures)]
    if not cures:
        told.append(("try", "none of the settings tried alone would gain 3%"))
    if slow := result["slow_rank"]:
        told.append(
            ("slow", f"rank {slow['rank']} {slow['host']}: {slow['times_the_median']:.1f} times the median's work")
        )
    terminal.table("verdict", told)


def _told(cure: Cure) -> str:
    low, middle, high = cure.predicted
    line = f"{cure.setting}: {middle:.2f} times the pace predicted ({low:.2f} to {high:.2f})"
    if cure.achieved is None:
        return line
    low, middle, high = cure.achieved
    judged = "as predicted" if held(cure.predicted, cure.achieved) else "the prediction failed"
    return f"{line}; {middle:.2f} achieved ({low:.2f} to {high:.2f}): {judged}"
