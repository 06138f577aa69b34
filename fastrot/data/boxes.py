"""Boxes of upright images at one size, read and decoded ahead, for who looks at each row once: numpy, no torch."""

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastrot.data.ahead import begun, by_a_thread
from fastrot.data.images import boxed, decode_upright, known
from fastrot.data.manifest import Manifest
from fastrot.data.storage import FileStorage, Reading
from fastrot.errors import BadImage
from fastrot_kernels.build import BuildError
from fastrot_kernels.turbo import Turbo

log = logging.getLogger(__name__)
Rows = NDArray[np.int64]
Boxes = NDArray[np.float64]
_READ_AHEAD, _DECODE_AHEAD, _READY = 4, 1, 2  # batches


@dataclass(frozen=True)
class Shown:
    """Some rows: int64 [n] of the manifest; pixels uint8 [n, S, S, 3]; unread {row: why}, which are not among them."""

    rows: Rows
    pixels: NDArray[np.uint8]
    unread: dict[int, str]


def shown(
    manifest: Manifest,
    parts: Iterable[Rows],
    boxes_of: Callable[[Rows], Boxes],
    size: int,
    threads: int,
    timeout: float,
) -> Generator[Shown, None, None]:
    """Given rows, a `Shown` for each of `parts`, in order.

    boxes_of  rows -> float64 [n, 4] (top, left, height, width) of the upright images, resized as Pillow's `resize(box=)`.
    Raises Fault where nothing comes for `timeout` seconds.
    """
    doing = ["starting"]

    def submitted(rows: Rows, reading: Reading) -> tuple[Rows, dict[int, str]]:
        doing[0] = f"reading rows {rows[:3].tolist()}... of {manifest.source}"
        found = list(zip(rows.tolist(), reading(), strict=True))
        unread = {row: str(buffer) for row, buffer in found if isinstance(buffer, BadImage)}
        buffers = [buffer for _, buffer in found if not isinstance(buffer, BadImage)]
        good = rows[[row not in unread for row in rows.tolist()]]
        orientations = [known(int(o), b) for o, b in zip(manifest.orientation[good], buffers, strict=True)]
        decoder.submit(buffers, np.array(orientations, np.uint8), boxes_of(good))
        return good, unread

    def decoded(rows: Rows, unread: dict[int, str]) -> Shown:
        doing[0] = f"decoding rows {rows[:3].tolist()}... of {manifest.source}"
        pixels, bad = decoder.result()
        good = [at for at in range(len(rows)) if at not in bad]
        return Shown(rows[good], pixels[good] if bad else pixels, unread | {int(rows[at]): bad[at] for at in bad})

    with closing(FileStorage(manifest)) as storage, closing(_Decoder(size, threads)) as decoder:
        reading = begun(((rows, storage.start(rows)) for rows in parts), _READ_AHEAD)
        decoding = begun((submitted(*one) for one in reading), _DECODE_AHEAD)
        with closing(
            by_a_thread((decoded(*one) for one in decoding), _READY, timeout, lambda: doing[0], lambda: None)
        ) as flow:
            yield from flow


@dataclass(frozen=True)
class _Flying:
    buffers: list[NDArray[np.uint8]]
    orientations: NDArray[np.uint8]
    boxes: Boxes


class _Decoder:
    """JPEGs by turbo; by Pillow, a thread each, what turbo leaves, and all where it cannot be compiled."""

    def __init__(self, size: int, threads: int):
        self._size, self._pool = size, ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._flying: deque[_Flying] = deque()
        self._turbo: Turbo | None = None
        try:
            self._turbo = Turbo(threads)
        except BuildError as error:
            log.warning("images are decoded by Pillow, which is slower (%s)", error)

    def submit(self, buffers: list[NDArray[np.uint8]], orientations: NDArray[np.uint8], boxes: Boxes) -> None:
        self._flying.append(_Flying(buffers, orientations, boxes))
        if self._turbo:
            self._turbo.submit(buffers, orientations, boxes, self._size)

    def result(self) -> tuple[NDArray[np.uint8], dict[int, str]]:
        """Of the oldest batch uint8 [n, S, S, 3], and {position: why} of those whose pixels are undefined."""
        batch, bad = self._flying.popleft(), {}
        if self._turbo:
            pixels, left = self._turbo.result()
            wanted = list(left)
        else:
            pixels = np.empty((len(batch.buffers), self._size, self._size, 3), np.uint8)
            wanted = list(range(len(pixels)))
        for at, found in zip(wanted, self._pool.map(lambda at: self._by_pillow(batch, at), wanted), strict=True):
            if isinstance(found, BadImage):
                bad[at] = str(found)
            else:
                pixels[at] = found
        return pixels, bad

    def _by_pillow(self, batch: _Flying, at: int) -> NDArray[np.uint8] | BadImage:
        buffer = batch.buffers[at]
        try:
            image = Image.fromarray(buffer) if buffer.ndim == 3 else decode_upright(buffer, int(batch.orientations[at]))
        except BadImage as error:
            return error
        return boxed(image, batch.boxes[at], self._size)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._turbo:
            self._turbo.close()
