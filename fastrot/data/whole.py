"""Whole images with what is known of them, in the exact stream's order: for detection and segmentation.

What is shown of an image is made by `prepare`, a pure function of the image, its row and its epoch.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late
from dataclasses import dataclass, replace
from typing import Generic, Protocol, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fastrot.data.bad_images import BadImages
from fastrot.data.images import decode_upright
from fastrot.data.manifest import Manifest
from fastrot.data.order import FullOrder, WindowOrder
from fastrot.data.plan import slice_of
from fastrot.data.storage import FileStorage
from fastrot.errors import BadImage, Fault


class Movable(Protocol):
    """A sample of tensors."""

    def to(self, device: torch.device) -> Self:
        """The same on `device`."""


T = TypeVar("T", bound=Movable)


@dataclass(frozen=True)
class WholeBatch(Generic[T]):
    """What one rank trains on, or judges, at once: rows int64 [n], and what `prepare` made of each."""

    rows: NDArray[np.int64]
    samples: list[T]
    views_of_step: int
    last: bool

    def to(self, device: torch.device) -> "WholeBatch[T]":
        """The batch with its samples on `device`."""
        return replace(self, samples=[sample.to(device) for sample in self.samples])


@dataclass(frozen=True)
class WholeStep(Generic[T]):
    """One step: its stream position and this rank's micro-steps."""

    step: int
    position: int
    epoch: float
    micro_steps: Iterator[WholeBatch[T]]


class WholeLoader(Generic[T]):
    """The whole images of a manifest, read, decoded and prepared by threads, batches ahead of the step.

    prepare  (upright RGB image, row, epoch) -> a sample; epoch -1: as evaluation shows it.
    depth    batches ahead.  timeout  seconds for one batch, after which a Fault is raised.
    An image that cannot be read is replaced by the next row that can, in manifest order, and listed.
    """

    def __init__(
        self,
        manifest: Manifest,
        order: FullOrder | WindowOrder,
        prepare: Callable[[Image.Image, int, int], T],
        bad: BadImages,
        threads: int,
        depth: int,
        timeout: float,
    ):
        self.manifest = manifest
        self._order, self._prepare, self._bad = order, prepare, bad
        self._storage, self._pool = FileStorage(manifest), ThreadPoolExecutor(threads, thread_name_prefix="whole")
        self._depth, self._timeout = depth, timeout

    def train(
        self, steps: range, position: int, images: int, ranks: int, rank: int, micro_steps: int
    ) -> Iterator[WholeStep[T]]:
        """This rank's share of steps `steps`, the first of which begins at stream position `position`.

        A step shows the images of its positions; wide ones come first in it, so that what is padded to one size is alike.
        """
        n = len(self.manifest)
        starts = range(position, position + len(steps) * images, images)
        shares = [slice_of(images, ranks, micro_steps, number, rank) for number in range(micro_steps)]
        grouped = (self._by_aspect(np.arange(start, start + images)) for start in starts)
        wanted = (self._at(positions[s:e]) for positions in grouped for s, e in shares)
        flow = self._flow(wanted)

        def of_step() -> Iterator[WholeBatch[T]]:
            for number in range(1, micro_steps + 1):
                rows, samples = next(flow)
                yield WholeBatch(rows, samples, images, number == micro_steps)

        for step, start in zip(steps, starts, strict=True):
            yield WholeStep(step, start, start / n, of_step())

    def held_out(self, ranks: int, rank: int, images: int) -> Iterator[WholeBatch[T]]:
        """This rank's contiguous share of all rows, in order, at most `images` a batch."""
        first, last = slice_of(len(self.manifest), ranks, 1, 0, rank)
        parts = (np.arange(at, min(at + images, last)) for at in range(first, last, images))
        for rows, samples in self._flow((part, np.full(len(part), -1)) for part in parts):
            yield WholeBatch(rows, samples, len(self.manifest), False)

    @property
    def bad_images(self) -> int:
        """Images that could not be read or decoded, and were replaced; over all ranks and resumes."""
        return self._bad.count

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._storage.close()

    def _by_aspect(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """A step's positions, those of wide images first, each kind in the stream's order."""
        rows, _ = self._at(positions)
        tall = self.manifest.height[rows] > self.manifest.width[rows]
        return positions[np.argsort(tall, kind="stable")]

    def _at(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows and epochs at these stream positions."""
        epochs, places = np.divmod(positions, len(self.manifest))
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = self._order.rows(places[here], int(epoch))
        return rows, epochs

    def _flow(
        self, wanted: Iterable[tuple[NDArray[np.int64], NDArray[np.int64]]]
    ) -> Iterator[tuple[NDArray[np.int64], list[T]]]:
        ahead: deque[list[Future[tuple[int, T]]]] = deque()
        try:
            for rows, epochs in wanted:
                pairs = zip(rows.tolist(), epochs.tolist(), strict=True)
                ahead.append([self._pool.submit(self._one, row, epoch) for row, epoch in pairs])
                if len(ahead) > self._depth:
                    yield self._finished(ahead.popleft())
            while ahead:
                yield self._finished(ahead.popleft())
        finally:
            for future in (one for batch in ahead for one in batch):
                future.cancel()

    def _finished(self, batch: list[Future[tuple[int, T]]]) -> tuple[NDArray[np.int64], list[T]]:
        try:
            done = [one.result(self._timeout) for one in batch]
        except Late:
            raise Fault(
                f"no batch for data.timeout {self._timeout:g} s: reading or decoding {self.manifest.source}"
            ) from None
        return np.array([row for row, _ in done], np.int64), [sample for _, sample in done]

    def _one(self, row: int, epoch: int) -> tuple[int, T]:
        """The sample of a row, or of the next that can be decoded; and which row it is."""
        reason = ""
        for _ in range(len(self.manifest)):
            (buffer,) = self._storage.read(np.array([row]))
            try:
                if isinstance(buffer, BadImage):
                    raise buffer
                return row, self._prepare(decode_upright(buffer), row, epoch)
            except BadImage as error:
                reason = str(error)
                self._bad.add(self.manifest.name(row), row, reason)
                row = (row + 1) % len(self.manifest)
        raise Fault(f"{self.manifest.source}: no row can be read any more; the last: {reason}")
