"""What bounds anybody's training loop, found from outside while it trains."""

import os
import statistics
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from multiprocessing import active_children
from pathlib import Path
from types import TracebackType
from typing import Generic, Self, TypeVar

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_leaves

from fastrot import machine
from fastrot.errors import UserError
from fastrot.profiling.marks import Mark, between, mark, memory_gib
from fastrot.profiling.verdict import Ceiling, Interval, Stages, Verdict, in_words, judge

_WARM = 3  # batches of a pass before it is timed
_LAPS, _LEAST = 5, 3
_SPAN = 8  # batches of a lap
_AHEAD = 8  # batches that a loader of unknown make may have ready
_READY = 2  # batches of a full queue that are sure to be there
_HELD = 0.125  # of the memory that is left
_TICKS = os.sysconf("SC_CLK_TCK")

T = TypeVar("T")


def watch(loop: Iterable[T]) -> "Watched[T]":
    """Watch a plain loop over batches: `with watch(loader) as p: for batch in p: ...`; then `print(p)`, or p.verdict.

    Its batches come as they would, in their order. Five times some of them are drawn ahead of need, which shows how fast
    the loader is alone, and handed out when it has nothing to do, which shows how fast the loop's body is alone. So the
    loader's own position runs ahead meanwhile, by as many batches as an eighth of the free memory holds at most.
    A body that ends with more than the last optimiser's step has that counted as other work.
    """
    return Watched(loop)


class Watched(Generic[T]):
    """See `watch`. Paces are batches/s."""

    def __init__(self, loop: Iterable[T]):
        self._loop = loop
        workers = getattr(loop, "num_workers", None)
        self._workers: int | None = workers
        self._depth = _AHEAD if workers is None else workers * (getattr(loop, "prefetch_factor", None) or 0)
        self._span = -(-_SPAN // (workers or 1)) * (workers or 1)
        self._data, self._step, self._both = _Laps(), _Laps(), _Laps()
        self._waits: list[float] = []
        self._apart: list[float] = []
        self._handed: list[float] = []
        self._stepped: Mark | None = None  # when an optimiser last had stepped
        self._bytes = self._seen = 0

    def __enter__(self) -> Self:
        self._hook = register_optimizer_step_post_hook(lambda *_: self._note_step())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._hook.remove()

    def __len__(self) -> int:
        return len(self._loop)  # type: ignore[arg-type]  # where the loop has one

    def __iter__(self) -> Iterator[T]:
        source = self._counted(iter(self._loop))
        yield from islice(source, _WARM)
        while len(self._step.paces) < _LAPS:
            yield from self._together(source)
            held = self._drawn(source)
            if not held:
                return
            time.sleep(self._depth / self._data.paces[-1] if self._data.paces else 0)  # it fills its queue, then rests
            yield from self._alone(held)
            yield from self._full(source)
        yield from source

    def _counted(self, source: Iterator[T]) -> Iterator[T]:
        for item in source:
            self._seen += 1
            if not self._bytes:
                self._bytes = sum(leaf.nbytes for leaf in tree_leaves(item) if isinstance(leaf, torch.Tensor))
            yield item

    def _together(self, source: Iterator[T]) -> Iterator[T]:
        """A lap as it would be."""
        marks: list[tuple[Mark, Mark, Mark | None, Mark]] = []
        began = _Now()
        for _ in range(self._span):
            asked = mark()
            item = next(source, None)
            if item is None:
                return
            came, self._stepped = mark(), None
            yield item
            marks.append((asked, came, self._stepped, mark()))
        self._both.add(began, self._span)
        seconds = self._span / self._both.paces[-1]
        self._waits.append(sum(between(asked, came) for asked, came, _, _ in marks) / seconds)
        body = sum(between(came, end) for _, came, _, end in marks)
        self._apart.append(sum(between(step, end) for _, _, step, end in marks if step is not None) / body)

    def _drawn(self, source: Iterator[T]) -> deque[T]:
        """A lap of the loader alone; what was ready is not of it."""
        most = int(_HELD * machine.memory_left()) // (self._bytes or 1)
        held = deque(islice(source, min(self._depth, most)))
        began = _Now()
        fresh = list(islice(source, min(self._span, most - len(held))))
        if len(fresh) == self._span:
            self._data.add(began, self._span)
        return held + deque(fresh)

    def _alone(self, held: deque[T]) -> Iterator[T]:
        """A lap of the loop's body alone."""
        began, count = _Now(), len(held)
        while held:
            yield held.popleft()
        self._step.add(began, count)

    def _full(self, source: Iterator[T]) -> Iterator[T]:
        """What brings a full queue to where training keeps it; the first of it are ready."""
        for at in range(2 * self._depth):
            asked = time.perf_counter()
            item = next(source, None)
            if item is None:
                return
            if at < _READY:
                self._handed.append(time.perf_counter() - asked)
            yield item

    def _note_step(self) -> None:
        self._stepped = mark()

    @property
    def stages(self) -> Stages:
        """What was measured. Raises UserError where there were too few batches."""
        laps = len(self._step.paces)
        if laps < _LEAST or not self._data.paces:
            cycle = 2 * self._span + 3 * self._depth
            raise UserError(
                f"watched {self._seen:,} batches, in passes that are too short or batches too large to hold "
                f"{self._span + self._depth} of them: about {_WARM + _LEAST * cycle} are needed, {_WARM + cycle} in a pass"
            )
        return Stages(
            machine.cores(),
            self._data.ceiling(),
            self._step.ceiling(),
            self._both.ceiling(),
            statistics.median(self._waits),
            statistics.median(self._apart),
            statistics.median(self._handed or [0.0]),
        )

    @property
    def verdict(self) -> Verdict:
        """What bounds the loop. Raises UserError where there were too few batches."""
        return judge(self.stages)

    @property
    def gains(self) -> dict[str, Interval]:
        """The pace over that now, were the loader free, the step, or what the body does besides; and, of a DataLoader
        that holds the loop up, with more workers, if twice as many load twice as fast."""
        stages = self.stages
        bound = judge(stages).bound
        then = {"a free loader": stages.without("data"), "a free step": stages.without("step")}
        if bound == "step" and stages.apart:
            then["no work between steps"] = stages.without("between")
        if self._workers is not None and bound in ("data", "ahead"):
            for more in {max(1, 2 * self._workers), max(machine.cores(), self._workers + 1)}:
                faster = stages.data.times(more / (self._workers or 1))
                then[f"num_workers={more}"] = replace(stages, data=faster)
        return {name: stages.gain(one) for name, one in then.items()}

    def __str__(self) -> str:
        stages = self.stages
        rows = [
            (
                name,
                f"{one.pace:.3g} batches/s ({min(one.paces):.3g} to {max(one.paces):.3g}), {one.pace * one.cpu_s:.1f} cores",
            )
            for name, one in (("the loader alone", stages.data), ("the body alone", stages.step), ("both", stages.both))
        ]
        rows.append(("memory", f"{memory_gib():.1f} GiB"))
        rows.append(("verdict", in_words(stages, judge(stages), "batches")))
        rows += [
            (name, f"{middle:.2f} times the pace ({low:.2f} to {high:.2f})")
            for name, (low, middle, high) in self.gains.items()
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


class _Laps:
    """Paces of laps, and the processor's seconds of a batch in each."""

    def __init__(self) -> None:
        self.paces: list[float] = []
        self._cpus: list[float] = []

    def add(self, began: "_Now", count: int) -> None:
        """So many batches since then."""
        now = _Now()
        self.paces.append(count / (now.wall_s - began.wall_s))
        self._cpus.append((now.cpu_s - began.cpu_s) / count)

    def ceiling(self) -> Ceiling:
        return Ceiling(self.paces, self._cpus)


class _Now:
    """This moment, once the GPU has done what it was asked: by the wall, and by the processor, its workers' included."""

    def __init__(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.wall_s = time.perf_counter()
        self.cpu_s = time.process_time() + sum(_cpu_s(child.pid) for child in active_children())


def _cpu_s(pid: int | None) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has just ended
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS
