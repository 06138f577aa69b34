"""What a decoder is given."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastrot.data import coding
from fastrot.data.images import kind_of


@dataclass(frozen=True)
class Batch:
    """Images and what to show of them.

    buffers       a file, uint8 [length], or pixels, uint8 [H, W, 3], each.
    orientations  uint8 [n], EXIF's 1..8 of the stored pixels, as the manifest decided: decoders read none.
    windows       int32 [n, 4] (top, left, height, width of the upright image), cropped, then resized; or float64
                  boxes, resized with taps outside them (evaluation).
    size          pixels, of a side of the result.
    codings       uint8 [n], as the manifest holds them; None: not known.
    """

    buffers: list[NDArray[np.uint8]]
    orientations: NDArray[np.uint8]
    windows: NDArray[np.int32] | NDArray[np.float64]
    size: int
    codings: NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return len(self.buffers)

    @property
    def boxes(self) -> bool:
        return self.windows.dtype == np.float64

    def some(self, at: Sequence[int]) -> "Batch":
        """These images alone."""
        where = np.asarray(at, np.int64)
        codings = None if self.codings is None else self.codings[where]
        return Batch([self.buffers[i] for i in at], self.orientations[where], self.windows[where], self.size, codings)

    def known_codings(self) -> NDArray[np.uint8]:
        """uint8 [n]; of those not known, what the bytes say now."""
        if self.codings is not None and self.codings.all():
            return self.codings
        known = np.zeros(len(self), np.uint8) if self.codings is None else self.codings.copy()
        for at in np.flatnonzero(known == coding.UNKNOWN).tolist():
            known[at] = coding.coding_of(kind_of(self.buffers[at]), self.buffers[at])
        return known

    def image(self, at: int) -> tuple[NDArray[np.uint8], int, NDArray[np.int32] | NDArray[np.float64], int]:
        """Buffer, orientation, window and size of one."""
        return self.buffers[at], int(self.orientations[at]), self.windows[at], self.size
