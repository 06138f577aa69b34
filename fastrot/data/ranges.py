"""Images of files at a distance: each a range, or blocks that neighbours share, many at once and ahead of need."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from fastrot.data.manifest import Manifest
from fastrot.data.reading import state_of
from fastrot.errors import Fault, UserError
from fastrot.remote import Entry, Store
from fastrot.remote.file import BLOCK, file_at, stretch
from fastrot.remote.store import PARALLEL

CACHE = 1 << 30  # bytes of blocks kept
_Part = tuple[Future[bytes], int, int]  # bytes, and which of them


class Ranges:
    """Stretches of a manifest's files.

    blocks  read whole blocks and keep up to CACHE bytes of them, for rows whose neighbours come soon; else what a row
            needs and no more.
    """

    def __init__(self, manifest: Manifest, blocks: bool):
        self._manifest, self._blocks = manifest, blocks
        self._pool = ThreadPoolExecutor(PARALLEL, thread_name_prefix="range")
        self._lock = threading.Lock()
        self._files: dict[int, Future[tuple[Store, Entry]]] = {}
        self._kept: OrderedDict[tuple[int, int], Future[bytes]] = OrderedDict()

    def start(
        self, rows: NDArray[np.int64], out: list[NDArray[np.uint8]]
    ) -> tuple[Callable[[], None], Callable[[], int | None]]:
        """Begin to read rows into `out`, uint8 [length] each. A function that waits until all is there, and one that gives
        the first place that is not. The first raises UserError (a server that lies, a file that changed) or Fault."""
        m = self._manifest
        columns = (column[rows].tolist() for column in (m.file, m.offset, m.length))
        with self._lock:
            parts = [self._parts(*of_row) for of_row in zip(*columns, strict=True)]

        def finish() -> None:
            for place, wanted in zip(out, parts, strict=True):
                at = 0
                for future, start, end in wanted:
                    place[at : at + end - start] = np.frombuffer(future.result(), np.uint8)[start:end]
                    at += end - start

        def pending() -> int | None:
            left = (at for at, wanted in enumerate(parts) if not all(part[0].done() for part in wanted))
            return next(left, None)

        return finish, pending

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _parts(self, file: int, offset: int, length: int) -> list[_Part]:
        if not self._blocks:
            return [(self._pool.submit(self._read, file, offset, offset + length), 0, length)]
        numbers = range(offset // BLOCK, -(-(offset + length) // BLOCK))
        return [
            (self._block(file, n), max(0, offset - n * BLOCK), min(BLOCK, offset + length - n * BLOCK)) for n in numbers
        ]

    def _block(self, file: int, number: int) -> Future[bytes]:
        """A block under way or kept; the least lately used go, which those who wait for them still hold."""
        key = (file, number)
        found = self._kept.get(key)
        if found is None or (found.done() and found.exception()):
            found = self._kept[key] = self._pool.submit(self._read, file, number * BLOCK, (number + 1) * BLOCK)
        self._kept.move_to_end(key)
        while len(self._kept) > CACHE // BLOCK:
            self._kept.popitem(last=False)
        return found

    def _read(self, file: int, start: int, end: int) -> bytes:
        store, entry = self._opened(file)
        return stretch(store, entry, start, end)

    def _opened(self, file: int) -> tuple[Store, Entry]:
        """A file, asked for once by whichever thread comes first. Raises UserError where it is not as it was indexed."""
        with self._lock:
            first = file not in self._files
            future = self._files.setdefault(file, Future())
        if first:
            try:
                store, entry = file_at(os.fsdecode(self._manifest.file_paths(np.array([file]))[0]))
                if changed := self._manifest.change(file, *state_of(entry)):
                    raise UserError(f"{store.at(entry.name)}: {changed}")
                future.set_result((store, entry))
            except (UserError, Fault) as error:  # whoever waits for the file gets it too; the next who asks tries again
                with self._lock:
                    del self._files[file]
                future.set_exception(error)
        return future.result()


def fit(manifest: Manifest, rows: int) -> bool:
    """Whether blocks pay: what so many neighbouring rows hold stays in the cache until it was used."""
    return rows * float(manifest.length.mean()) < CACHE / 2
