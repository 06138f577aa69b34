"""Laps of the data path's stages by themselves: bytes off the disk, pixels out of bytes in memory, all of it."""

import os
import time
from collections.abc import Callable, Iterator
from itertools import count, cycle

import numpy as np
from numpy.typing import NDArray

from fastrot.data.decode import Decoder
from fastrot.data.decode.batch import Batch
from fastrot.data.manifest import Manifest
from fastrot.data.plan import Plan
from fastrot.data.storage import FileStorage
from fastrot.errors import BadImage
from fastrot.profiling.verdict import Ceiling

LAPS = 5
_HELD = 512  # images whose bytes are held to decode them alone


def ceiling(work: Callable[[], int], seconds: float) -> Ceiling:
    """work() -> how many images it has done, over and over: LAPS laps of at least `seconds` / LAPS each."""
    paces: list[float] = []
    work()  # warms up
    in_all, began_cpu = 0, time.process_time()
    for _ in range(LAPS):
        done, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds / LAPS or not done:
            done += work()
        paces.append(done / (time.perf_counter() - began))
        in_all += done
    return Ceiling(paces, (time.process_time() - began_cpu) / in_all)


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
        return ceiling(work_cold if cold else work, seconds)
    finally:
        storage.close()


def _forget(manifest: Manifest, rows: NDArray[np.int64]) -> None:
    for row in rows.tolist():
        handle = os.open(manifest.path(row), os.O_RDONLY)
        os.posix_fadvise(handle, int(manifest.offset[row]), int(manifest.length[row]), os.POSIX_FADV_DONTNEED)
        os.close(handle)


def decoding(
    manifest: Manifest, plan: Plan, decoder: Decoder, images: int, size: int, seconds: float, in_flight: int
) -> Ceiling:
    """Windows of the stream's images out of bytes that are in memory; `in_flight` batches at the decoder at once."""
    held = cycle(_held(manifest, plan, images, size))
    flying: list[int] = []

    def work() -> int:
        while len(flying) < in_flight:
            batch = next(held)
            decoder.submit(batch)
            flying.append(len(batch))
        decoder.result()
        return flying.pop(0)

    result = ceiling(work, seconds)
    while flying:
        decoder.result()
        flying.pop()
    return result


def _held(manifest: Manifest, plan: Plan, images: int, size: int) -> list[Batch]:
    storage = FileStorage(manifest)
    batches = []
    size_of = min(images, len(manifest))
    for at in range(max(1, min(_HELD, len(manifest)) // size_of)):
        sample = plan.at(at * size_of, (at + 1) * size_of)
        read = storage.read(sample.rows)
        good = [at for at, buffer in enumerate(read) if not isinstance(buffer, BadImage)]
        buffers = [buffer for buffer in read if not isinstance(buffer, BadImage)]
        batches.append(
            Batch(buffers, np.maximum(manifest.orientation[sample.rows[good]], 1), sample.windows[good], size)
        )
    storage.close()
    return batches
