"""Where a step's time goes, on a device that works while its host runs ahead."""

from types import SimpleNamespace

import pytest
import torch

from fastrot.profiling import clock as clocks
from fastrot.profiling.clock import SPANS, Clock, communicating


class Device:
    """A queue: what is asked for begins when it is free, or when the host asks, whichever is later."""

    def __init__(self):
        self.host = self.free = 0.0

    def work(self, seconds: float) -> None:
        self.free = max(self.free, self.host) + seconds

    def synchronize(self) -> None:
        self.host = self.free = max(self.host, self.free)


@pytest.fixture
def device(monkeypatch):
    device = Device()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            device.work(0.0)
            self.at = device.free

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", device.synchronize)
    monkeypatch.setattr(clocks, "time", SimpleNamespace(perf_counter=lambda: device.host))
    return device


@pytest.mark.parametrize("batch_s, waits", [(0.2, 0.0), (1.0, 0.0), (1.5, 1 / 3)])
def test_waiting_is_the_devices_not_the_hosts(device, batch_s, waits):
    """A second of work a step, which the host launches in no time; batches come every batch_s. The host waits for most
    of them, the device only where they come more slowly than it works."""

    def batches():
        for number in range(1, 31):
            device.host = max(device.host, number * batch_s)
            yield number

    clock = Clock(torch.device("cuda"))
    for _ in clock.waiting(batches()):
        with clock.stage("compute"):
            device.work(1.0)
        clock.end_step()
    steps = clock.read()
    times = {name: sum(step[name] for step in steps) for name in SPANS}
    total = sum(times.values())
    assert times["compute"] == pytest.approx(30)
    first = batch_s  # nothing to do before the first batch
    assert times["wait"] - first == pytest.approx(waits * (total - first), abs=0.5)
    assert times["wait"] + times["compute"] == pytest.approx(total)


@pytest.mark.parametrize("watched", [False, True])
def test_what_is_communicated_is_taken_from_the_stage_around_it(device, monkeypatch, watched):
    """Three steps of a second of work, of which the norms communicate 0.4 and the gradients another 0.1 besides; the
    host then has work of its own, for which the device waits. Only the last step is watched, and tells of the others."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    clock = Clock(torch.device("cuda"))
    for last in (False, False, True):
        clock.watch(last and watched)
        with clock.stage("compute"):
            device.work(0.6)
            communicating(device.work, 0.4)
        with clock.stage("update"):
            communicating(device.work, 0.1)
            device.work(0.3)
        device.host = device.free + 0.5
        clock.end_step()
    norms = 0.4 if watched else 0.0
    want = {"compute": 1 - norms, "communicate": norms + 0.1, "update": 0.3, "host": 0.5}
    assert clock.read() == [pytest.approx(dict.fromkeys(SPANS, 0.0) | want)] * 3
    assert clock.read() == []


def test_outside_a_stage_nothing_is_timed():
    clock, done = Clock(torch.device("cpu")), []
    communicating(done.append, 1)
    clock.end_step()
    assert done == [1] and clock.read()[0]["communicate"] == 0
