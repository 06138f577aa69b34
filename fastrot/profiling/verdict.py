"""What bounds a training, by what each of its stages reaches alone; and what a cure would give. Pure arithmetic."""

import statistics
from dataclasses import dataclass

NEAR = 0.9  # of a ceiling: who reaches so much of it is bound by it


@dataclass(frozen=True)
class Ceiling:
    """A stage alone. paces: images/s, a lap each; cpu_s: seconds of one core that an image takes there."""

    paces: list[float]
    cpu_s: float

    @property
    def pace(self) -> float:
        return statistics.median(self.paces)


@dataclass(frozen=True)
class Stages:
    """One rank's; on a CPU the step and the data path share `cores`, on a GPU the step's cpu_s is the host's alone.

    cold  bytes read from the disk itself, warm: from the system's memory; decode: of bytes in memory; data: the whole
    path, as configured; step: on a batch that is there; both: as in training.
    """

    cores: float
    cold: Ceiling
    warm: Ceiling
    decode: Ceiling
    data: Ceiling
    step: Ceiling
    both: Ceiling

    def limits(self, data: Ceiling | None = None, step: Ceiling | None = None) -> dict[str, float]:
        """images/s that each part allows, of this data path and step or of others in their place."""
        data, step = data or self.data, step or self.step
        return {"data": data.pace, "step": step.pace, "cores": self.cores / (data.cpu_s + step.cpu_s)}

    def gain(self, data: Ceiling | None = None, step: Ceiling | None = None) -> tuple[float, float, float]:
        """(lowest, median, highest) of the training's pace with these in place of its own, over its pace now; as far as
        the laps of what is new lie apart."""
        now, new = min(self.limits().values()), data or step
        assert new is not None, "nothing is new"

        def with_pace(pace: float) -> float:
            share = pace / new.pace
            scaled = Ceiling([pace], new.cpu_s / share)
            return min(self.limits(scaled if data else None, scaled if step else None).values()) / now

        low, high = min(new.paces), max(new.paces)
        return with_pace(low), with_pace(new.pace), with_pace(high)


@dataclass(frozen=True)
class Verdict:
    """bound: data, step or cores, the least of the limits; stage: cold, warm or decode where it is the data path, else
    the bound, of the cores the part that takes more of them. bound_pace and next_pace in images/s; reached: share of
    the bound that training reaches."""

    bound: str
    stage: str
    bound_pace: float
    next: str
    next_pace: float
    reached: float


def judge(stages: Stages) -> Verdict:
    """Which stage bounds the training, how near it comes to that, and what would bound it next."""
    limits = stages.limits()
    order = sorted(limits, key=lambda name: limits[name])
    bound, following = order[0], order[1]
    larger = "step" if stages.step.cpu_s >= stages.data.cpu_s else "data"
    stage = larger if bound == "cores" else bound
    if stage == "data":
        stage = _slowest_of_the_data_path(stages)
    reached = stages.both.pace / limits[bound]
    return Verdict(bound, stage, limits[bound], following, limits[following], reached)


def _slowest_of_the_data_path(stages: Stages) -> str:
    """The part whose own ceiling is nearest to the path's; cold reads only where the path is as slow as they are."""
    alone = {"cold": stages.cold.pace, "warm": stages.warm.pace, "decode": stages.decode.pace}
    if stages.cold.pace > stages.data.pace / NEAR:
        del alone["cold"]
    return min(alone, key=lambda name: alone[name])


def held(predicted: tuple[float, float, float], achieved: tuple[float, float, float]) -> bool:
    """Whether a prediction's interval and what was measured overlap, a tenth of either way allowed for the machine."""
    return predicted[0] * NEAR <= achieved[2] and achieved[0] <= predicted[2] / NEAR
