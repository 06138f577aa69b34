"""A micro-step's forward and backward pass as one CUDA graph for each shape of its views."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fastrot.data.loader import MicroBatch

# Before a shape is captured it runs so often by itself: kernels are compiled, cuDNN measures its algorithms, the
# gradients get their memory. Source: torch's notes on CUDA semantics, whole-network capture.
WARM_UPS = 3

Learn = Callable[[Tensor, MicroBatch], Tensor]
Replay = Callable[[], object]


class Graphed:
    """`learn(views, batch) -> sums` replayed from graphs; learn reads of a batch only its turns and views_of_step.

    Every call is a real one: the first few of a shape run as they are, on the stream that captures, since a run to
    warm up would change the running statistics. Gradients are added to memory that must stay where it is: zero it,
    don't drop it. Graphs share one pool of memory, as they run one after another and leave nothing there but sums,
    which hold until the next call.
    """

    def __init__(self, learn: Learn, device: torch.device, capture: "Capturing | None" = None):
        self._learn = learn
        self._seen: Counter[tuple[int, ...]] = Counter()
        self._graphs: dict[tuple[int, ...], tuple[Tensor, MicroBatch, Replay, Tensor]] = {}
        self._capture = capture or Capture(device)

    def __call__(self, views: Tensor, batch: MicroBatch) -> Tensor:
        key = (*views.shape, batch.views_of_step)
        self._seen[key] += 1
        if self._seen[key] <= WARM_UPS:
            with self._capture.beside():
                return self._learn(views, batch)
        if key not in self._graphs:
            held = torch.empty_like(views)
            none: Any = None  # all else of a batch: what reads it fails here, not on every later batch
            turns = replace(batch, turns=batch.turns.clone(), pixels=none, flips=none, sample=none, labels=none)
            self._graphs[key] = (held, turns, *self._capture(lambda: self._learn(held, turns)))
        held, turns, replay, sums = self._graphs[key]
        held.copy_(views)
        turns.turns.copy_(batch.turns)
        replay()
        return sums


class Capturing(Protocol):
    """The device's side of it."""

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """(what replays the work, its result, whose memory each replay fills anew)."""

    def beside(self) -> AbstractContextManager[None]:
        """Where what is not captured runs, on the stream that captures."""


class Capture:
    """CUDA's. One pool for all shapes, and once a graph is captured, for what warms up the next: beside it each shape
    would take its memory a second time. Gradients, which the first shape makes, lie outside."""

    def __init__(self, device: torch.device):
        self._device, self._captured = device, False
        self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.MemPool()
        # or the maps of a batch one image larger would fit nowhere in the pool
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda._POOL_HANDLE(self._pool.id)
        # thread_local: the loader's threads go on copying and allocating meanwhile
        with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
            result = work()
        self._captured = True
        return graph.replay, result

    @contextmanager
    def beside(self) -> Iterator[None]:
        """On the stream that captures, after what was queued before and before what follows."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream), self._in_the_pool() if self._captured else nullcontext():
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    @contextmanager
    def _in_the_pool(self) -> Iterator[None]:
        torch.cuda.empty_cache()  # an allocation in a pool does not free what is cached outside
        # a pool takes its own thread's allocations, and autograd's threads would run the backward pass
        with torch.cuda.use_mem_pool(self._pool, self._device), torch.autograd.set_multithreading_enabled(False):
            yield
