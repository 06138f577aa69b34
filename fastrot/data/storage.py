"""Reading image bytes: positioned reads, many at once, never mapped."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from fastrot.data.images import KINDS
from fastrot.data.manifest import Manifest
from fastrot.errors import BadImage

_RAW = KINDS.index("RAW")
_READERS = 8  # concurrent reads a rank: enough to keep an SSD's queue filled
_PARTS = 2  # of a batch, a reader each: batches ahead fill the others, and few threads want the interpreter at once


class FileStorage:
    """Images as stretches of files. One that cannot be read comes back as a BadImage in its place."""

    def __init__(self, manifest: Manifest):
        self._manifest = manifest
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="read")

    def read(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8] | BadImage]:
        """The bytes of these rows, in order: uint8 [length] each, or [height, width, 3] where they are pixels."""
        return self.start(rows)()

    def start(self, rows: NDArray[np.int64]) -> Callable[[], list[NDArray[np.uint8] | BadImage]]:
        """Begin to read these rows; what it returns waits for them, and gives what `read` does."""
        found: list = [None] * len(rows)
        parts = [self._pool.submit(self._read_some, wanted, found) for wanted in self._dealt(rows)]

        def finish() -> list[NDArray[np.uint8] | BadImage]:
            for part in parts:
                part.result()
            return found

        return finish

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _dealt(self, rows: NDArray[np.int64]) -> list[list[tuple[int, ...]]]:
        """[(place in rows, row, file, offset, length)] for every reader, neighbours of a file together."""
        m = self._manifest
        file = m.file[rows]
        order = np.argsort(file, kind="stable")
        columns = (order, rows[order], file[order], m.offset[rows][order], m.length[rows][order])
        wanted = list(zip(*(column.tolist() for column in columns), strict=True))
        share = -(-len(wanted) // _PARTS)
        return [wanted[at : at + share] for at in range(0, len(wanted), share or 1)]

    def _read_some(self, wanted: list[tuple[int, ...]], found: list) -> None:
        with _OpenFile(self._manifest) as file:
            for at, row, number, offset, length in wanted:
                found[at] = self._read_one(file, row, number, offset, length)

    def _read_one(self, file: "_OpenFile", row: int, number: int, offset: int, want: int):
        try:
            handle, size = file.of(number, row)
        except OSError as error:
            return BadImage(f"cannot be opened ({error.strerror})")
        if size < offset + want or (size != want and not offset):  # a shard's images have an offset
            return BadImage(f"changed: {size} bytes, {offset + want} when indexed")
        buffer = np.empty(want, np.uint8)
        try:
            got = os.preadv(handle, [buffer], offset)
        except OSError as error:
            return BadImage(f"cannot be read ({error.strerror})")
        if got != want:
            return BadImage(f"ended after {got} of {want} bytes")
        if self._manifest.kind[row] == _RAW:
            return buffer.reshape(int(self._manifest.height[row]), int(self._manifest.width[row]), 3)
        return buffer


class _OpenFile:
    """The file a reader is at: a shard is opened once for the neighbours in it."""

    def __init__(self, manifest: Manifest):
        self._manifest, self._number, self._handle, self._size = manifest, -1, -1, -1

    def __enter__(self) -> "_OpenFile":
        return self

    def __exit__(self, *_) -> None:
        self._close()

    def of(self, number: int, row: int) -> tuple[int, int]:
        """Handle and size of file `number`, which row is in. Raises OSError."""
        if number != self._number:
            self._close()
            self._handle = os.open(self._manifest.path(row), os.O_RDONLY)
            self._number, self._size = number, os.fstat(self._handle).st_size
        return self._handle, self._size

    def _close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
        self._number = self._handle = -1
