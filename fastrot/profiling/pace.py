"""What bounds a training now, which step was slow, and which rank holds the others up: of what each rank's clock says.
Pure arithmetic."""

import statistics
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any, Self

from fastrot.profiling.clock import SPANS, Spans

SLOW_STEP = 3.0  # times the running median: a step to log
SLOW_RANK = 1.2  # times the median of the ranks' own work: a rank to name
WAITS = 0.1  # of a step: who waits so long for data is bound by it
_RECENT = 100  # steps that the running median is of
_SETTLED = 10  # steps before the first that can be slow: they compile, measure, fill
_MEANS = {
    "wait": "waiting for data",
    "copy": "copying to the device",
    "rotate": "making the views",
    "compute": "forward and backward",
    "communicate": "communication",
    "update": "the optimiser's update",
    "host": "the host's work between stages",
}


@dataclass(frozen=True)
class Slow:
    """A step: its number, how many times the running median it took, and its spans; -1: none was slow."""

    step: int
    times: float
    spans: Spans


@dataclass(frozen=True)
class Report:
    """One rank's of a line: spans of the mean step, and the slowest step."""

    mean: Spans
    slow: Slow

    def numbers(self) -> list[float]:
        """As they are gathered."""
        of_slow = [self.slow.step, self.slow.times, *(self.slow.spans[name] for name in SPANS)]
        return [*(self.mean[name] for name in SPANS), *of_slow]

    @classmethod
    def of(cls, numbers: list[float]) -> Self:
        mean, slow = numbers[: len(SPANS)], numbers[len(SPANS) + 2 :]
        step, times = numbers[len(SPANS) : len(SPANS) + 2]
        return cls(_spans(mean), Slow(int(step), times, _spans(slow)))


class Pace:
    """The recent steps of this rank."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._seen = 0

    def report(self, steps: list[Spans], first: int) -> Report:
        """Of a line's steps, the first of which has number `first`."""
        totals = [sum(step.values()) for step in steps]
        self._recent.extend(totals)
        median = statistics.median(self._recent)
        settled = [at for at in range(len(steps)) if self._seen + at >= _SETTLED]
        self._seen += len(steps)
        slow = Slow(-1, 0.0, _spans([0.0] * len(SPANS)))
        if settled and totals[at := max(settled, key=lambda at: totals[at])] > SLOW_STEP * median:
            slow = Slow(first + at, totals[at] / median, steps[at])
        return Report(_spans([statistics.fmean(step[name] for step in steps) for name in SPANS]), slow)


def seen(reports: list[Report], hosts: tuple[str, ...]) -> dict[str, Any]:
    """What a line says of all ranks' reports: `bound`, and where there is one, `slow_step` and `straggler`."""
    found: dict[str, Any] = {"bound": bound(reports)}
    if (step := slow_step(reports, hosts)) is not None:
        found["slow_step"] = asdict(step)
    if (rank := straggler(reports, hosts)) is not None:
        found["straggler"] = asdict(rank)
    return found


def bound(reports: list[Report]) -> str:
    """data, step, host or communication. Judged by the rank that waits least for the others, who sets the pace: it is
    bound by data where it waits for any, since all else then has time to spare; else by what takes most."""
    pacer = min((one.mean for one in reports), key=lambda mean: mean["communicate"])
    if pacer["wait"] > WAITS * sum(pacer.values()):
        return "data"
    step = sum(pacer[name] for name in ("copy", "rotate", "compute", "update"))
    shares = {"step": step, "host": pacer["host"], "communication": pacer["communicate"]}
    return max(shares, key=lambda name: shares[name])


@dataclass(frozen=True)
class Where:
    """rank, host: who was slow, none where no rank's own work was; times: what is usual; stage: most of the excess."""

    rank: int | None
    host: str
    times: float
    stage: str


@dataclass(frozen=True)
class SlowStep(Where):
    step: int
    seconds: float


def straggler(reports: list[Report], hosts: tuple[str, ...]) -> Where | None:
    """The rank whose own work takes longest, if the others' median is far below; they wait for it in communication."""
    own = [_own(one.mean) for one in reports]
    worst = max(range(len(own)), key=lambda rank: own[rank])
    usual = statistics.median_low(own)
    if own[worst] <= SLOW_RANK * usual:
        return None
    others = _spans([statistics.median_low(one.mean[name] for one in reports) for name in SPANS])
    stage = _excess(reports[worst].mean | {"communicate": 0.0}, others)
    return Where(worst, _host(hosts, worst), own[worst] / usual, stage)


def slow_step(reports: list[Report], hosts: tuple[str, ...]) -> SlowStep | None:
    """The slowest of the ranks' slow steps. Ranks go in step, so that it is slow on all: by the work of one, unless
    even there it is communication that took so long."""
    slow = {rank: one.slow for rank, one in enumerate(reports) if one.slow.step >= 0}
    if not slow:
        return None
    worst = max(slow.values(), key=lambda one: one.times)
    same = [rank for rank, one in slow.items() if one.step == worst.step]
    rank = max(same, key=lambda rank: _own(slow[rank].spans))
    stage = _excess(slow[rank].spans, reports[rank].mean)
    seconds = sum(slow[rank].spans.values())
    named = None if stage == "communicate" else rank
    return SlowStep(named, _host(hosts, named), slow[rank].times, stage, worst.step, seconds)


def in_words(values: dict[str, Any]) -> list[str]:
    """A line for each thing of `seen` that a person should know."""
    lines = []
    if one := values.get("slow_step"):
        lines.append(
            f"step {one['step'] + 1:,} took {one['seconds']:.3g} s, {one['times']:.1f} times the median: "
            f"{_MEANS[one['stage']]}{_who(one)}"
        )
    if one := values.get("straggler"):
        lines.append(f"straggler:{_who(one)} takes {one['times']:.1f} times the median's work: {_MEANS[one['stage']]}")
    return lines


def _who(one: dict[str, Any]) -> str:
    if one["rank"] is None:
        return ""
    return f" on rank {one['rank']}{' of ' + one['host'] if one['host'] else ''}"


def _host(hosts: tuple[str, ...], rank: int | None) -> str:
    return hosts[rank] if hosts and rank is not None else ""


def _own(spans: Spans) -> float:
    return sum(spans.values()) - spans["communicate"]


def _excess(spans: Spans, usual: Spans) -> str:
    """Where most of the difference is."""
    return max(SPANS, key=lambda name: spans[name] - usual[name])


def _spans(values: list[float]) -> Spans:
    return dict(zip(SPANS, values, strict=True))
