"""An image's bytes as a .beton holds them: a JPEG, or upright RGB pixels; and the processes that make them.

Imports no torch, so that a process starts quickly.
"""

import io
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastrot.data import beton
from fastrot.data.images import KINDS, decode_upright, kind_of, known
from fastrot.data.jpeg import frame_of
from fastrot.data.manifest import Manifest
from fastrot.data.storage import FileStorage
from fastrot.errors import BadImage, Unreadable, UserError
from fastrot.watch import die_with_parent

_JPEG = KINDS.index("JPEG")


class Sample(NamedTuple):
    data: bytes
    mode: int
    """beton.JPEG or beton.RAW."""
    height: int
    width: int
    kept: bool
    """Whether these are the source's own bytes."""


@dataclass(frozen=True)
class Encoding:
    """How rows are stored.

    mode      keep: JPEG bytes as they are where they are upright and usual, else jpeg; jpeg: encoded
              at `quality`; raw: pixels; mix: raw for `raw_share` of the rows, evenly, keep for the others.
    max_side  images are shrunk (area average, as by FFCV's writer) until no side is longer.
    """

    mode: Literal["keep", "jpeg", "raw", "mix"]
    quality: int = 90
    max_side: int | None = None
    raw_share: float = 0.5

    def check(self) -> None:
        """Raises UserError where a number is out of its range."""
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality {self.quality}: is not between 1 and 100")
        if self.max_side is not None and not 1 <= self.max_side <= beton.MOST_SIDE:
            raise UserError(f"--max-side {self.max_side}: is not between 1 and {beton.MOST_SIDE}")
        if not 0 <= self.raw_share <= 1:
            raise UserError(f"--raw-share {self.raw_share}: is not between 0 and 1")

    def raw(self, row: int) -> bool:
        """Whether a row is stored as pixels."""
        if self.mode == "mix":
            return int((row + 1) * self.raw_share) > int(row * self.raw_share)
        return self.mode == "raw"

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width as stored."""
        most = max(height, width)
        if self.max_side is None or most <= self.max_side:
            return height, width
        return max(1, height * self.max_side // most), max(1, width * self.max_side // most)

    def largest(self, manifest: Manifest) -> int:
        """Bytes that no sample of the file exceeds.

        Raises UserError where an image's side is more than a .beton can tell.
        """
        most = np.maximum(manifest.height, manifest.width).astype(np.int64)
        if self.max_side is None and most.max() > beton.MOST_SIDE:
            place = manifest.name(int(most.argmax()))
            raise UserError(f"{place}: a side of {most.max()} pixels, most is {beton.MOST_SIDE}; shrink it: --max-side")
        sides = [self.size(h, w) for h, w in zip(manifest.height.tolist(), manifest.width.tolist(), strict=True)]
        pixels = 3 * max(h * w for h, w in sides) + 4096  # a JPEG of noise is larger than its pixels by its tables
        kept = manifest.length[manifest.kind == _JPEG] if self.mode in ("keep", "mix") else manifest.length[:0]
        return max(pixels, int(kept.max(initial=0)))

    def encode(self, buffer: NDArray[np.uint8], row: int, orientation: int) -> Sample:
        """One row's sample from its bytes [length] or pixels [H, W, 3], which lie as the manifest says.

        Raises BadImage.
        """
        raw = self.raw(row)
        orientation = known(orientation, buffer)
        if self.mode in ("keep", "mix") and not raw and buffer.ndim == 1 and orientation == 1:
            kept = self._kept(buffer)
            if kept:
                return kept
        image = Image.fromarray(buffer) if buffer.ndim == 3 else decode_upright(buffer, orientation)
        height, width = self.size(image.height, image.width)
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling.BOX)
        if raw:
            return Sample(image.tobytes(), beton.RAW, height, width, False)
        out = io.BytesIO()
        image.save(out, "JPEG", quality=self.quality)
        return Sample(out.getvalue(), beton.JPEG, height, width, False)

    def _kept(self, buffer: NDArray[np.uint8]) -> Sample | None:
        """The bytes as they are, where every reader of a .beton shows them as they should be."""
        frame = frame_of(buffer) if kind_of(buffer) == "JPEG" else None
        if frame is None or not frame.usual or self.size(frame.height, frame.width) != frame[:2]:
            return None
        return Sample(buffer.tobytes(), beton.JPEG, frame.height, frame.width, True)


_work: tuple[Manifest, FileStorage, Encoding] | None = None  # of this process, when it is a worker


def start_worker(folder: Path, encoding: Encoding) -> None:
    """Make this process ready for `encode_rows` of the manifest in `folder`; it ends with its parent."""
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent ends its workers
    die_with_parent()
    manifest = Manifest.load(folder)
    _work = manifest, FileStorage(manifest), encoding


def encode_rows(rows: range) -> list[Sample | str]:
    """The samples of neighbouring rows, or why one cannot be decoded. Raises Unreadable: a file would lack it for ever."""
    assert _work is not None, "start_worker comes first"
    manifest, storage, encoding = _work
    samples: list[Sample | str] = []
    for row, buffer in zip(rows, storage.read(np.array(rows)), strict=True):
        if isinstance(buffer, BadImage):
            raise Unreadable(f"{manifest.name(row)}: {buffer}")
        try:
            samples.append(encoding.encode(buffer, row, int(manifest.orientation[row])))
        except BadImage as error:
            samples.append(str(error))
    return samples
