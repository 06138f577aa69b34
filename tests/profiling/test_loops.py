"""A loop watched from outside, by a simulated clock: what is found is what the simulation was told."""

from types import SimpleNamespace

import pytest
import torch

import fastrot
from fastrot.profiling import loops, marks


class Clock:
    now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Workers:
    """A DataLoader of one worker, or of none: a batch takes `load` seconds, `depth` of them are ready at most."""

    def __init__(self, clock, load, workers=1, prefetch=2, batches=400, take=0.0):
        self.clock, self.load, self.batches, self.take = clock, load, batches, take
        self.num_workers, self.prefetch_factor = workers, prefetch

    def __iter__(self):
        depth, ready, taken = self.num_workers * self.prefetch_factor, self.clock.now, []
        for at in range(self.batches):
            if not depth:
                self.clock.now += self.load
            else:
                ready = max(ready, taken[at - depth] if at >= depth else 0.0) + self.load
                self.clock.now = max(self.clock.now, ready) + self.take
            taken.append(self.clock.now)
            yield at


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    reads = SimpleNamespace(perf_counter=lambda: clock.now, process_time=lambda: 0.0, sleep=clock.sleep)
    monkeypatch.setattr(loops, "time", reads)
    monkeypatch.setattr(marks, "time", reads)
    monkeypatch.setattr(loops, "active_children", list)
    return clock


def watched(clock, load, step, besides=0.0, **loader):
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    source = Workers(clock, load, **loader)
    with fastrot.profiling.watch(source) as watch:
        seen = []
        for batch in watch:
            seen.append(batch)
            clock.sleep(step)
            optimizer.step()
            clock.sleep(besides)
    assert seen == list(range(source.batches))
    return watch


@pytest.mark.parametrize(
    "parts, stage, gain",
    [
        ({"load": 3.0, "step": 1.0}, "data", 3.0),
        ({"load": 1.0, "step": 3.0}, "step", 3.0),
        ({"load": 1.0, "step": 1.0, "besides": 2.0}, "between", 3.0),
        ({"load": 1.0, "step": 1.0, "workers": 0}, "ahead", 2.0),
        ({"load": 1.0, "step": 3.0, "workers": 0}, "ahead", 4 / 3),
        ({"load": 0.5, "step": 2.0, "take": 1.0}, "step", 3.0),  # without the step the hand-over is left
    ],
)
def test_a_planted_bound_and_the_gain_without_it_are_found(clock, parts, stage, gain):
    found = watched(clock, **parts).verdict
    assert found.stage == stage
    assert found.gain == pytest.approx((gain, gain, gain))


def test_gains_are_those_of_the_same_simulation_without_a_part(clock):
    """The oracle: the loop run again, the part left out."""

    def pace(**parts):
        began = clock.now
        watched(clock, batches=300, **parts)
        return 300 / (clock.now - began)

    watch = watched(clock, load=3.0, step=1.0)
    now = watch.stages.both.pace
    assert now == pytest.approx(1 / 3, rel=0.02)
    assert watch.gains["a free loader"][1] * now == pytest.approx(pace(load=1e-6, step=1.0), rel=0.02)
    assert watch.gains["a free step"][1] == pytest.approx(1)
    assert watch.gains["num_workers=2"][1] == pytest.approx(2)
    said = str(watch)
    assert "bound by the data path" in said and "a free loader     3.00 times the pace (3.00 to 3.00)" in said


def test_passes_add_up_and_too_few_batches_are_one_line(clock):
    source = Workers(clock, 1.0, batches=40)
    with fastrot.profiling.watch(source) as watch:
        for _ in range(2):
            with pytest.raises(fastrot.UserError, match="are needed") as error:
                _ = watch.verdict
            assert "\n" not in str(error.value)
            for _ in watch:
                clock.sleep(0.5)
    assert watch.verdict.stage == "data"


def test_what_ends_the_loop_early_leaves_no_hook(clock):
    weight = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(KeyboardInterrupt), fastrot.profiling.watch(Workers(clock, 1.0)) as watch:
        for at in watch:
            clock.sleep(1.0)
            if at == 20:
                raise KeyboardInterrupt
    torch.optim.SGD([weight], lr=0.1).step()
    assert watch._stepped is None
