"""What a decoder is given."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Batch:
    """Images and what to show of them.

    buffers       a file, uint8 [length], or pixels, uint8 [H, W, 3], each.
    orientations  uint8 [n], EXIF's 1..8 of the stored pixels, as the manifest decided: decoders read none.
    windows       int32 [n, 4] (top, left, height, width of the upright image), cropped, then resized; or float64
                  boxes, resized with taps outside them (evaluation).
    size          pixels, of a side of the result.
    """

    buffers: list[NDArray[np.uint8]]
    orientations: NDArray[np.uint8]
    windows: NDArray[np.int32] | NDArray[np.float64]
    size: int

    def __len__(self) -> int:
        return len(self.buffers)

    @property
    def boxes(self) -> bool:
        return self.windows.dtype == np.float64

    def some(self, at: Sequence[int]) -> "Batch":
        """These images alone."""
        where = np.asarray(at, np.int64)
        return Batch([self.buffers[i] for i in at], self.orientations[where], self.windows[where], self.size)

    def image(self, at: int) -> tuple[NDArray[np.uint8], int, NDArray[np.int32] | NDArray[np.float64], int]:
        """Buffer, orientation, window and size of one."""
        return self.buffers[at], int(self.orientations[at]), self.windows[at], self.size
