"""Crops damaged against shortcuts: blurred, their colours shifted, their edges covered, encoded as a JPEG again.

A file keeps traces that lie in one direction of the upright image: a JPEG's grid, tables and chroma siting, a lens's colour
fringes, a resampling kernel, a frame or a caption at its edge. A network can tell a turn by these and learn nothing of
what is shown (Minderer et al. 2020: "color aberrations or watermarks"; Lorch and Boehme 2024, arXiv:2406.15206, measure
how directional files are). Damage drawn afresh for each image and epoch hides them; but damage that lies in a direction of
the upright crop would be turned with it and be one more trace. Two ways out: damage each view once it is turned, in the
frame that is shown; or damage the crop in a frame turned by a quarter of its own, drawn at random. Either way damage says
nothing of the turn. The second is taken: it costs one encoding an image, not four, leaves `rotate_views` the last step, and
shows old traces and new ones in every direction to one another.
"""

import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from fastrot.data.randomness import BLUR, BORDER, FRINGE, RECODE, below, philox, uniform


@dataclass(frozen=True)
class Damage:
    """What happens to one crop of side S.

    quarter   turns counter-clockwise, 0..3, of the frame in which all the rest is done.
    blur      standard deviations of a Gaussian along x and y, pixels.
    shifts    float [2, 2], pixels: red's and blue's, (down, right) each.
    widths    int [4], pixels: of a bar at the top, left, bottom and right.  colour  uint8 [3], the bars'.
    quality   of the JPEG, 1..100; 0: it is not encoded.  subsampling  of its chroma, Pillow's: 0 is 4:4:4, 2 is 4:2:0.
    """

    quarter: int
    blur: tuple[float, float]
    shifts: NDArray[np.float64]
    widths: NDArray[np.int64]
    colour: NDArray[np.uint8]
    quality: int
    subsampling: int


@dataclass(frozen=True)
class Corruptions:
    """How much damage there may be, and under which seed it is drawn: a function of (seed, row, epoch), as the stream is.

    jpeg          share of the crops that are encoded again, at a quality between quality[0] and quality[1].
    chroma_shift  most pixels that red and blue are moved along each axis, either way.
    border        most of a side that a bar covers; half of the edges have none.
    blur          largest standard deviation, pixels; half of the axes have none.
    """

    seed: int
    jpeg: float = 0.0
    quality: tuple[int, int] = (30, 95)
    chroma_shift: float = 0.0
    border: float = 0.0
    blur: float = 0.0

    def __bool__(self) -> bool:
        return max(self.jpeg, self.chroma_shift, self.border, self.blur) > 0

    def drawn(self, rows: NDArray[np.int64], epochs: NDArray[np.int64], side: int) -> list[Damage]:
        """What happens to the crops of these rows in these epochs, [n] each."""
        recode, colours = philox(self.seed, rows, epochs, RECODE), philox(self.seed, rows, epochs, BORDER, 1) >> 24
        shifts, widths, sigmas = (uniform(philox(self.seed, rows, epochs, p)) for p in (FRINGE, BORDER, BLUR))
        quality = self.quality[0] + below(recode[:, 1], self.quality[1] - self.quality[0] + 1)
        quality[uniform(recode[:, 0]) >= self.jpeg] = 0
        shifts = self.chroma_shift * (2 * shifts - 1)
        widths = (side * self.border * np.maximum(0, 2 * widths - 1)).astype(np.int64)
        sigmas = self.blur * np.maximum(0, 2 * sigmas - 1)
        return [
            Damage(
                int(recode[i, 3] >> 30),
                (float(sigmas[i, 0]), float(sigmas[i, 1])),
                shifts[i].reshape(2, 2),
                widths[i],
                colours[i, :3].astype(np.uint8),
                int(quality[i]),
                int(recode[i, 2] >> 31) * 2,
            )
            for i in range(len(rows))
        ]


def damaged(crop: NDArray[np.uint8], damage: Damage) -> NDArray[np.uint8]:
    """A crop uint8 [S, S, 3] in the order of a photograph's way: out of focus, fringed, framed, filed."""
    out = np.rot90(crop, damage.quarter).copy()
    if any(damage.blur):
        out = np.array(Image.fromarray(out).filter(ImageFilter.GaussianBlur(damage.blur)))
    if damage.shifts.any():
        for channel, shift in zip((0, 2), damage.shifts, strict=True):
            out[..., channel] = shifted(out[..., channel], *shift)
    top, left, bottom, right = damage.widths
    side = len(out)
    out[:top] = out[side - bottom :] = out[:, :left] = out[:, side - right :] = damage.colour
    if damage.quality:
        out = recoded(out, damage.quality, damage.subsampling)
    return np.ascontiguousarray(np.rot90(out, -damage.quarter))


def shifted(plane: NDArray[np.uint8], down: float, right: float) -> NDArray[np.uint8]:
    """A plane [S, S] moved by parts of a pixel, linearly between neighbours; its edge repeats."""
    moved: NDArray[np.float64] = plane.astype(np.float64)
    for by in (down, right):
        at = np.clip(np.arange(len(moved)) - by, 0, len(moved) - 1)
        low = at.astype(np.int64)
        high = np.minimum(low + 1, len(moved) - 1)
        moved = (moved[low] + (moved[high] - moved[low]) * (at - low)[:, None]).T
    return np.rint(moved).astype(np.uint8)


def recoded(image: NDArray[np.uint8], quality: int, subsampling: int) -> NDArray[np.uint8]:
    """uint8 [H, W, 3] as a JPEG of it holds it."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality, subsampling=subsampling)
    return np.asarray(Image.open(file))


class Corruptor:
    """Damages a batch, on the host, by threads: each image by itself, so alike in any batch."""

    def __init__(self, corruptions: Corruptions, threads: int):
        self._corruptions = corruptions
        self._pool = ThreadPoolExecutor(threads, "corruptor")

    def __call__(
        self, crops: NDArray[np.uint8], rows: NDArray[np.int64], epochs: NDArray[np.int64]
    ) -> NDArray[np.uint8]:
        """Crops uint8 [n, S, S, 3] -> damaged."""
        damages = self._corruptions.drawn(rows, epochs, crops.shape[1])
        return np.stack(list(self._pool.map(damaged, crops, damages)))

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
