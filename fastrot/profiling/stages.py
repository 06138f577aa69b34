"""Laps of the data path's stages by themselves: bytes off the disk, pixels out of bytes in memory, all of it."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import count, cycle
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastrot.data.bad_images import BadImages
from fastrot.data.decode import Decoder
from fastrot.data.decode.batch import Batch
from fastrot.data.images import decode_upright
from fastrot.data.loader import DECODES_IN_FLIGHT, Loader
from fastrot.data.manifest import Manifest
from fastrot.data.plan import Plan
from fastrot.data.storage import FileStorage
from fastrot.errors import BadImage
from fastrot.profiling.verdict import Ceiling

_TIMEOUT_S = 60.0
LAPS = 5
_HELD = 128  # images whose bytes are held to decode them alone
_PIXELS = 64  # and whose pixels, to resample them alone


def ceiling(work: Callable[[], float], seconds: float, took: list[float] | None = None) -> Ceiling:
    """work() -> how many images it has done, over and over: LAPS laps of at least `seconds` / LAPS each.

    took  gets the seconds of each call.
    """
    paces: list[float] = []
    cpus: list[float] = []
    took = [] if took is None else took
    work()  # warms up
    for _ in range(LAPS):
        done, began, began_cpu = 0.0, time.perf_counter(), time.process_time()
        last = began
        while last - began < seconds / LAPS or not done:
            done += work()
            before, last = last, time.perf_counter()
            took.append(last - before)
        paces.append(done / (last - began))
        cpus.append((time.process_time() - began_cpu) / done)
    return Ceiling(paces, cpus)


def batches_of(manifest: Manifest, plan: Plan, images: int) -> Iterator[NDArray[np.int64]]:
    """Rows of the stream, batch after batch, without end."""
    size = min(images, len(manifest))
    return (plan.at(at * size, (at + 1) * size).rows for at in count())


def reading(manifest: Manifest, plan: Plan, images: int, seconds: float, cold: bool) -> Ceiling:
    """Bytes of the stream's rows. cold: the system is told to forget them first, so that the disk must give them."""
    storage, rows = FileStorage(manifest), batches_of(manifest, plan, images)

    def work() -> int:
        some = next(rows)
        return len(storage.read(some))

    def work_cold() -> int:
        some = next(rows)
        _forget(manifest, some)
        return len(storage.read(some))

    try:
        found = ceiling(work_cold if cold else work, seconds)
    finally:
        storage.close()
    some = next(rows)
    files = len(np.unique(np.asarray(manifest.file)[some])) / len(some)
    return replace(found, more={"bytes": float(np.mean(manifest.length)), "opens": files})


def _forget(manifest: Manifest, rows: NDArray[np.int64]) -> None:
    for row in rows.tolist():
        handle = os.open(manifest.path(row), os.O_RDONLY)
        os.posix_fadvise(handle, int(manifest.offset[row]), int(manifest.length[row]), os.POSIX_FADV_DONTNEED)
        os.close(handle)


def decoding(batches: list[Batch], decoder: Decoder, seconds: float) -> Ceiling:
    """Windows of images that are in memory, as bytes or as pixels; several batches at the decoder at once."""
    held = cycle(batches)
    flying: list[int] = []

    def work() -> int:
        while len(flying) < DECODES_IN_FLIGHT:
            batch = next(held)
            decoder.submit(batch)
            flying.append(len(batch))
        decoder.result()
        return flying.pop(0)

    found = ceiling(work, seconds)
    for _ in flying:
        decoder.result()
    return found


class _Still:
    """Storage and decoder that have everything: what a loader does besides is left."""

    name = "nothing to decode"

    def __init__(self, pixels: torch.Tensor):
        self._pixels = pixels
        self._bytes = np.zeros(0, np.uint8)
        self._flying: deque[int] = deque()

    def start(self, rows: NDArray[np.int64]) -> Callable[[], list[NDArray[np.uint8]]]:
        return lambda: [self._bytes] * len(rows)

    def submit(self, batch: Batch) -> None:
        self._flying.append(len(batch))

    def result(self) -> tuple[torch.Tensor, dict[int, str]]:
        return self._pixels[: self._flying.popleft()], {}

    def close(self) -> None: ...


def handing_over(
    manifest: Manifest, plan: Plan, images: int, size: int, device: torch.device, depth: int, seconds: float
) -> Ceiling:
    """Planned batches from the loader's thread, to the device where it is a GPU; nothing is read or decoded."""
    still: Any = _Still(torch.zeros(images, size, size, 3, dtype=torch.uint8))
    loader = Loader(manifest, plan, still, still, BadImages(None, manifest.source, 0), device, depth, _TIMEOUT_S)
    try:
        steps = loader.train(range(10**6), 0, images, 1, 0, 1, lambda epoch: size)
        with closing(steps):
            micro = (batch for step in steps for batch in step.micro_steps)
            return ceiling(lambda: len(next(micro).pixels), seconds)
    finally:
        loader.close()


def held_bytes(manifest: Manifest, plan: Plan, images: int, size: int) -> list[Batch]:
    """Batches of the stream as their files' bytes."""
    return _held(manifest, plan, images, size, _HELD)


def held_pixels(manifest: Manifest, plan: Plan, images: int, size: int) -> list[Batch]:
    """As pixels, upright: there is only to cut and resample."""
    return [_decoded(batch) for batch in _held(manifest, plan, min(images, _PIXELS), size, _PIXELS)]


def _decoded(batch: Batch) -> Batch:
    pixels = [one if one.ndim == 3 else np.asarray(decode_upright(one)) for one in batch.buffers]
    return Batch(pixels, np.ones(len(pixels), np.uint8), batch.windows, batch.size)


def _held(manifest: Manifest, plan: Plan, images: int, size: int, most: int) -> list[Batch]:
    storage = FileStorage(manifest)
    batches = []
    size_of = min(images, len(manifest))
    for at in range(max(1, min(most, len(manifest)) // size_of)):
        sample = plan.at(at * size_of, (at + 1) * size_of)
        read = storage.read(sample.rows)
        good = [at for at, buffer in enumerate(read) if not isinstance(buffer, BadImage)]
        buffers = [buffer for buffer in read if not isinstance(buffer, BadImage)]
        batches.append(
            Batch(buffers, np.maximum(manifest.orientation[sample.rows[good]], 1), sample.windows[good], size)
        )
    storage.close()
    return batches
