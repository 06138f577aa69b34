"""The exact stream: what a step shows, as a pure function of (seed, data, config, position)."""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastrot.data import augment
from fastrot.data.order import FullOrder, WindowOrder


@dataclass(frozen=True)
class Sample:
    """What happens to some positions of the stream; every array has one entry an image.

    rows int64 [n] of the manifest, epochs int64 [n], windows int32 [n, 4] (top, left, height,
    width of the upright image; evaluation and shifted crops: float64 boxes), flips uint8 [n],
    turns uint8 [n, V] (= labels of the views).
    """

    rows: NDArray[np.int64]
    epochs: NDArray[np.int64]
    windows: NDArray[np.int32] | NDArray[np.float64]
    flips: NDArray[np.uint8]
    turns: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, first: int, last: int) -> "Sample":
        """Images first .. last - 1 of it."""
        return Sample(*(array[first:last] for array in vars(self).values()))

    def replaced(self, where: int, other: "Sample") -> "Sample":
        """A copy whose image `where` is the only image of `other`."""
        fields = {name: array.copy() for name, array in vars(self).items()}
        for name, array in fields.items():
            array[where] = getattr(other, name)[0]
        return Sample(**fields)


@dataclass(frozen=True)
class Plan:
    """The stream of one data set under one seed and one set of augmentations.

    heights, widths  int32 [N] of the upright images, by row.
    order            FullOrder or WindowOrder over the N rows.
    views            "all" or "one": four turns an image, or one at random.
    shift            (short, crop) where windows are random crops of the central square, instead of scale and ratio.
    squash           images are squashed to squares whole: ratio is in terms of their own aspect, evaluation crops nothing.
    """

    seed: int
    heights: NDArray[np.int32]
    widths: NDArray[np.int32]
    order: FullOrder | WindowOrder
    views: str = "all"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    shift: tuple[int, int] | None = None
    squash: bool = False

    def at(self, first: int, last: int) -> Sample:
        """The images at stream positions first .. last - 1; they may straddle epochs."""
        return self.at_all(np.arange(first, last, dtype=np.int64))

    def at_all(self, positions: NDArray[np.int64]) -> Sample:
        """The images at these stream positions [n]; a thousand cost little more than one."""
        epochs, places = np.divmod(positions, len(self.heights))
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = self.order.rows(places[here], int(epoch))
        return self.of(rows, epochs)

    def of(self, rows: NDArray[np.int64], epochs: NDArray[np.int64]) -> Sample:
        """What happens to given rows in given epochs."""
        which = self.seed, rows, epochs, self.heights[rows], self.widths[rows]
        return Sample(
            rows,
            epochs,
            augment.shifted_boxes(*which, *self.shift)
            if self.shift
            else augment.crop_windows(*which, self.scale, self.ratio, self.squash),
            augment.flips(self.seed, rows, epochs, self.flip),
            augment.turns(self.seed, rows, epochs, self.views),
        )

    def held_out(self, rows: NDArray[np.int64], short: int, crop: int) -> Sample:
        """How evaluation shows given rows: short side resized, central crop, or squashed whole; no flip, four turns."""
        sides = self.heights[rows], self.widths[rows]
        boxes = augment.whole_boxes(*sides) if self.squash else augment.central_boxes(*sides, short, crop)
        none = np.zeros(len(rows), np.uint8)
        return Sample(rows, none.astype(np.int64), boxes, none, augment.turns(self.seed, rows, 0, "all"))


def micro_steps_of(images: int, ranks: int, per_micro_step: int | None) -> int:
    """Micro-steps a step takes when a rank holds at most `per_micro_step` images at once."""
    return -(-images // (ranks * per_micro_step)) if per_micro_step else 1


def slice_of(images: int, ranks: int, micro_steps: int, micro_step: int, rank: int) -> tuple[int, int]:
    """The share [s, e) of a step's images that one rank handles in one micro-step.

    Shares need not be even: sizes differ by at most one, and over all ranks and micro-steps they
    cover every image once.
    """
    start = images * micro_step // micro_steps
    length = images * (micro_step + 1) // micro_steps - start
    return start + length * rank // ranks, start + length * (rank + 1) // ranks


class StreamHash:
    """sha256 over the steps of a stream: rows, windows, flips, turns and labels of each step."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()

    def add(self, step: Sample, labels: NDArray[np.integer]) -> None:
        """One step: the whole sample, and its labels int64 [B] (or int8 [B, 20], multi-label); boxes enter as <f8."""
        windows = (step.windows, "<i4" if step.windows.dtype.kind == "i" else "<f8")
        kinds = (step.rows, "<i8"), windows, (step.flips, "u1"), (step.turns, "u1")
        for array, kind in (*kinds, (labels, "<i8" if labels.ndim == 1 else "i1")):
            self._sha.update(np.ascontiguousarray(array.astype(kind)).tobytes())

    def hexdigest(self) -> str:
        return self._sha.hexdigest()
