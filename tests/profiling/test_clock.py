"""Where a step's time goes, on a device that works while its host runs ahead."""

from types import SimpleNamespace

import pytest
import torch

from fastrot.profiling import clock as clocks
from fastrot.profiling.clock import Clock


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
    times = clock.read()
    assert times["compute"] == pytest.approx(30)
    first = batch_s  # nothing to do before the first batch
    assert times["wait"] - first == pytest.approx(waits * (times["total"] - first), abs=0.5)
    assert times["wait"] + times["compute"] == pytest.approx(times["total"])
