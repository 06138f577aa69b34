"""Times of a step's stages, by events on a GPU and clocks on a CPU, without a host sync."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch

T = TypeVar("T")
STAGES = ("wait", "copy", "rotate", "compute", "communicate", "update")
SPANS = (*STAGES, "host")  # what a step's time is made of
Spans = dict[str, float]


class _Span(NamedTuple):
    """within: the stage that it is part of, and is taken from; none where it is a stage itself."""

    name: str
    begin: Any
    end: Any
    within: str = ""


class Clock:
    """Seconds of every step since the last `read`: waiting for data, its copy to the device, making views, forward +
    backward, communication (sums over ranks, waiting for the others included), update; host: all else between them.

    On a GPU all are the device's, from CUDA events that are read when a line is due, so that nothing waits in between:
    a host that runs ahead and waits for a batch while the device is busy counts no `wait`. What norms communicate in
    the forward and backward pass is timed there in steps that are watched, and its share taken for the line's others;
    within a CUDA graph it stays part of `compute`.
    """

    _now: ClassVar["tuple[Clock, str] | None"] = None  # whose stage this process is in, and which

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._mark: Callable[[], Any] = _event if self._cuda else time.perf_counter
        self._watched = False
        self._reset()

    def _reset(self) -> None:
        self._spans: list[_Span] = []
        self._steps: list[tuple[list[_Span], Any, Any]] = []
        self._began = self._mark()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add what runs inside to stage `name`."""
        begin, Clock._now = self._mark(), (self, name)
        try:
            yield
        finally:
            Clock._now = None
        self._spans.append(_Span(name, begin, self._mark()))

    def waiting(self, items: Iterable[T]) -> Iterator[T]:
        """The items, the time until each counted as `wait`."""
        source = iter(items)
        while True:
            with self.stage("wait"):
                item = next(source, None)
            if item is None:
                return
            yield item

    def watch(self, on: bool) -> None:
        """Whether a GPU's clock times what the norms communicate in the step that follows; a CPU's always does."""
        self._watched = on

    def end_step(self) -> None:
        """What has run since the last is a step's."""
        ended = self._mark()
        self._steps.append((self._spans, self._began, ended))
        self._spans, self._began = [], ended

    def read(self) -> list[Spans]:
        """Seconds of each step since the last read, by span: together they are its time. Syncs a GPU."""
        if self._cuda:
            torch.cuda.synchronize()
        steps = [self._seconds(*step) for step in self._steps]
        if self._cuda and steps:
            norms = sum(self._between(s.begin, s.end) for s in self._steps[-1][0] if s.within == "compute")
            share = norms / (norms + steps[-1]["compute"]) if norms else 0.0
            for step in steps[:-1]:
                step["communicate"] += share * step["compute"]
                step["compute"] *= 1 - share
        self._steps = []
        return steps

    def _seconds(self, spans: list[_Span], began: Any, ended: Any) -> Spans:
        out = dict.fromkeys(SPANS, 0.0)
        for span in spans:
            seconds = self._between(span.begin, span.end)
            out[span.name] += seconds
            if span.within:
                out[span.within] -= seconds
        out["host"] = max(0.0, self._between(began, ended) - sum(out.values()))
        return out

    def _times(self, stage: str) -> bool:
        """Whether collectives of this stage are timed now: those of the forward and backward pass are many."""
        if not self._cuda:
            return True
        return (self._watched or stage != "compute") and not torch.cuda.is_current_stream_capturing()

    def _between(self, begin: Any, end: Any) -> float:
        seconds: float = begin.elapsed_time(end) / 1e3 if self._cuda else end - begin
        return seconds

    def skip(self) -> None:
        """Forget what has run since the last read (an evaluation, a checkpoint)."""
        self._reset()


def communicating(collective: Callable[..., T], *arguments: Any) -> T:
    """collective(*arguments), or waiting for one, counted as communication within the stage that this process is in, if
    it is in one."""
    if torch.compiler.is_compiling() or (now := Clock._now) is None or not now[0]._times(now[1]):
        return collective(*arguments)
    clock, stage = now
    begin = clock._mark()
    result = collective(*arguments)
    clock._spans.append(_Span("communicate", begin, clock._mark(), stage))
    return result


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
