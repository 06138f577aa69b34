"""Times of a step's stages, by events on a GPU and clocks on a CPU, without a host sync."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
STAGES = ("wait", "copy", "rotate", "compute", "update")


class Clock:
    """Seconds since the last `read`: waiting for data, its copy to the device, making views, forward +
    backward, update (communication included).

    On a GPU all are the device's, from CUDA events that are read when a line is due, so that nothing waits in between:
    a host that runs ahead and waits for a batch while the device is busy counts no `wait`.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._reset()

    def _reset(self) -> None:
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._start = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add what runs inside to stage `name`."""
        if self._cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - began

    def waiting(self, items: Iterable[T]) -> Iterator[T]:
        """The items, the time until each counted as `wait`."""
        source = iter(items)
        while True:
            with self.stage("wait"):
                item = next(source, None)
            if item is None:
                return
            yield item

    def read(self) -> dict[str, float]:
        """Seconds by stage and `total` by the wall since the last read; starts anew. Syncs a GPU."""
        if self._cuda:
            torch.cuda.synchronize()
        for name, begin, end in self._events:
            self._seconds[name] += begin.elapsed_time(end) / 1e3
        times = {**self._seconds, "total": time.perf_counter() - self._start}
        self._reset()
        return times

    def skip(self) -> None:
        """Forget what has run since the last read (an evaluation, a checkpoint)."""
        self._reset()
