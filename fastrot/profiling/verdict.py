"""What bounds a training, by what each of its stages reaches alone; and what a cure would give. Pure arithmetic."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fastrot.data.loader_settings import interval

NEAR = 0.9  # of a ceiling: who reaches so much of it is bound by it

SEEN = 1.03  # a gain below it nobody could see

Interval = tuple[float, float, float]
"""Lower end, the figure, upper end."""

NAMES = {
    "cold": "reading from the disk",
    "warm": "reading from memory",
    "reads": "reading, a second time too",
    "decode": "decoding",
    "resample": "resampling",
    "hand-over": "the hand-over of batches",
    "data": "the data path",
    "step": "the step",
    "between": "other work of the loop between steps",
    "cores": "the processor's cores",
    "ahead": "too little that is loaded ahead",
    "rank": "a slow rank",
}


@dataclass(frozen=True)
class Ceiling:
    """A stage alone, by lap. paces: images/s; cpus: seconds of one core that an image takes there; more: what else it
    takes or moves there, such as bytes."""

    paces: list[float]
    cpus: list[float]
    more: dict[str, float] = field(default_factory=dict)

    @property
    def pace(self) -> float:
        """All images over all the time: of stages that come in bursts too."""
        spent = sum(1 / pace for pace in self.paces)
        return len(self.paces) / spent if spent else math.inf

    @property
    def cpu_s(self) -> float:
        return statistics.fmean(self.cpus)

    @property
    def ends(self) -> tuple["Ceiling", "Ceiling", "Ceiling"]:
        """At the least that it may be, as it is, and at the most."""
        (slow, _, fast), (cheap, _, dear) = interval(self.paces), interval(self.cpus)
        return Ceiling([slow], [dear]), Ceiling([self.pace], [self.cpu_s]), Ceiling([fast], [cheap])

    def times(self, factor: float) -> "Ceiling":
        """At a multiple of its pace, for the same work."""
        return Ceiling([factor * pace for pace in self.paces], self.cpus)


FREE = Ceiling([math.inf], [0.0])


@dataclass(frozen=True)
class Stages:
    """One rank's; on a CPU the step and the data path share `cores`, on a GPU the step's cpu_s is the host's alone.

    data   the whole data path, as configured; step: on a batch that is there; both: as in training.
    waits  share of the time of both that the step waits for data.
    apart  share of the step's time that is other work of the loop's: logs, metrics, whatever is no step.
    handed seconds that the loop's own thread takes to get an image that is ready.
    deeper what more batches ahead would gain, as simulated with the times of the data path's own; infinite: not known.
    path   parts of the data path by themselves: cold (bytes from the disk itself), warm (from the system's memory),
           decode (of bytes in memory), ...; none where they are not known.
    """

    cores: float
    data: Ceiling
    step: Ceiling
    both: Ceiling
    waits: float
    apart: float = 0.0
    handed: float = 0.0
    deeper: float = math.inf
    path: Mapping[str, Ceiling] = field(default_factory=dict)

    def limits(self) -> dict[str, float]:
        """images/s that each part allows."""
        cpu_s, step_s = self.data.cpu_s + self.step.cpu_s, self.handed + 1 / self.step.pace
        return {
            "data": self.data.pace,
            "step": 1 / step_s if step_s else math.inf,
            "cores": self.cores / cpu_s if cpu_s else math.inf,
        }

    @property
    def least(self) -> float:
        """images/s that the slowest part allows."""
        return min(self.limits().values())

    @property
    def reached(self) -> float:
        """Share of the least limit."""
        return self.both.pace / self.least

    @property
    def ahead(self) -> bool:
        """Whether the step waits though the data path alone is fast enough."""
        return self.reached < NEAR and self.waits > 1 - NEAR and self.deeper > SEEN

    def gain(self, then: "Stages") -> Interval:
        """The pace of a training of other stages over this one's, as far as the laps of what bounds it then lie apart.
        It stays as far from its bound as it is, but where too little was loaded ahead."""
        now = self.both.pace if self.ahead else self.least
        ends = zip(then.data.ends, then.step.ends, strict=True)
        low, middle, high = (replace(then, data=data, step=step).least / now for data, step in ends)
        return low, middle, high

    def without(self, stage: str) -> "Stages":
        """What a training would be where a stage took no time."""
        if stage == "ahead":
            return self
        if stage == "cores":
            return replace(self, cores=math.inf)
        if stage == "between":
            rest = 1 - self.apart
            step = self.step.times(1 / rest)
            return replace(self, step=replace(step, cpus=[rest * cpu for cpu in step.cpus]), apart=0.0)
        if stage == "step":
            return replace(self, step=FREE)
        gone = {"reads": ("cold", "warm")}.get(stage, (stage, "cold"))
        path = {name: one for name, one in self.path.items() if name not in gone}
        if not path or stage == "data":
            return replace(self, data=FREE, handed=0.0, path={})
        slowest = min(path.values(), key=lambda one: one.pace)
        return replace(self, data=replace(slowest, cpus=self.data.cpus), path=path)


@dataclass(frozen=True)
class Verdict:
    """bound: data, step or cores, the least of the limits; or ahead, where none of them is reached and the step waits.
    stage: a part of the data path where it is that, `between` where most of a step is none, of the cores the part that
    takes more of them. bound_pace and next_pace in images/s; reached: share of the bound that training reaches.
    gain: of the training's pace, were that free; next: the stage that would bound it then."""

    bound: str
    stage: str
    bound_pace: float
    next: str
    next_pace: float
    reached: float
    gain: Interval


def judge(stages: Stages) -> Verdict:
    """Which stage bounds the training, how near it comes to that, and what would bound it next."""
    limits = stages.limits()
    bound = "ahead" if stages.ahead else min(limits, key=lambda name: limits[name])
    stage = bound
    if bound == "cores":
        stage = "step" if stages.step.cpu_s >= stages.data.cpu_s else _slowest_of_the_data_path(stages)
    elif bound == "data":
        stage = _slowest_of_the_data_path(stages)
    elif bound == "step" and stages.apart > 0.5:
        stage = "between"
    then = stages.without("cores" if bound == "cores" else stage)
    left = then.limits()
    after = min(left, key=lambda name: left[name])
    following = _slowest_of_the_data_path(then) if after == "data" else after
    return Verdict(bound, stage, stages.least, following, left[after], stages.reached, stages.gain(then))


def _slowest_of_the_data_path(stages: Stages) -> str:
    """The part whose own ceiling is nearest to the path's; cold reads only where the path is as slow as they are, and
    no other reads where these are as slow."""
    alone = {name: one.pace for name, one in stages.path.items()}
    if alone.get("cold", 0) > stages.data.pace / NEAR:
        del alone["cold"]
    least = min(alone, key=lambda name: alone[name], default="data")
    return "reads" if least in ("cold", "warm") and alone["warm"] <= alone.get("cold", 0) / NEAR else least


def ratio(new: list[float], now: list[float]) -> Interval:
    """A pace over another, by laps that ran in turns."""
    low, _, high = interval([b / a for a, b in zip(now, new, strict=True)])
    return low, min(max(low, Ceiling(new, [0.0]).pace / Ceiling(now, [0.0]).pace), high), high


def held(predicted: Interval, achieved: Interval) -> bool:
    """Whether a prediction's interval and what was measured overlap, a tenth of either way allowed for the machine."""
    return predicted[0] * NEAR <= achieved[2] and achieved[0] <= predicted[2] / NEAR


def in_words(stages: Stages, verdict: Verdict, unit: str) -> str:
    """The verdict for a person. unit: what is counted, images or batches."""
    what = NAMES[verdict.stage]
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
    low, middle, high = verdict.gain
    return (
        f"bound by {what}: {_pace(verdict.bound_pace)} {unit}/s are the most, {_pace(stages.both.pace)} are reached "
        f"({verdict.reached:.0%}{noise}; {stages.waits:.0%} of the time waits for data). Without it "
        f"{middle:.2f} times the pace ({low:.2f} to {high:.2f}); {NAMES[verdict.next]} would bound it at "
        f"{_pace(verdict.next_pace)}"
    )


def _pace(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
