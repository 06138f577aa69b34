"""A stop that every rank makes at the same step: asked for by a signal to any of them, or by `run.max_hours`."""

import signal
import threading
import time
from collections import deque
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from fastrot.distributed import Ranks

CTRL_C = "Ctrl-C"
# of several requests the last in this list is the one that is said
_REASONS = ("", "run.max_hours", "SIGUSR1", "SIGTERM", CTRL_C)
_SIGNALS = {signal.SIGUSR1: "SIGUSR1", signal.SIGTERM: "SIGTERM", signal.SIGINT: CTRL_C}
_BEHIND = 2  # steps: what was asked then is known by now, so that nobody waits for it


class Stop:
    """Within `with`, signals ask for a stop in place of ending the process; a second Ctrl-C ends it at once.

    until  on the monotonic clock, or None: when `run.max_hours` are over.
    Signals are heard in the main thread alone: elsewhere they keep their meaning.
    """

    def __init__(self, ranks: Ranks, until: float | None):
        self._ranks, self._until, self._request = ranks, until, 0
        self._flying: deque[tuple[torch.Tensor, Any]] = deque()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._request = max(self._request, _REASONS.index(_SIGNALS[signal.Signals(number)]))
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    def heard(self) -> str:
        """Why to stop after this step, or nothing; every rank calls it once a step, and all hear the same."""
        if not self._request and self._until is not None and time.monotonic() >= self._until:
            self._request = _REASONS.index("run.max_hours")
        if self._ranks.world == 1:
            return _REASONS[self._request]
        self._flying.append(self._sent())
        if len(self._flying) <= _BEHIND:
            return ""
        flag, arrived = self._flying.popleft()
        arrived()
        return _REASONS[int(flag)]

    def _sent(self) -> tuple[torch.Tensor, Any]:
        """The greatest request of any rank: a host's tensor, and what waits until it is there."""
        flag = torch.tensor([self._request], dtype=torch.int32)
        if self._ranks.device.type != "cuda":
            work = dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True)
            return flag, work.wait
        there = flag.pin_memory().to(self._ranks.device, non_blocking=True)
        dist.all_reduce(there, dist.ReduceOp.MAX)
        back, event = torch.empty_like(flag, pin_memory=True), torch.cuda.Event()
        back.copy_(there, non_blocking=True)
        event.record()
        return back, event.synchronize
