"""Reading image bytes: positioned reads, many at once, never mapped."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrot.data.images import KINDS
from fastrot.data.manifest import Manifest
from fastrot.data.reading import again
from fastrot.errors import BadImage, Unreadable

_RAW = KINDS.index("RAW")
_READERS = 8  # concurrent reads a rank: enough to keep an SSD's queue filled
_PARTS = 2  # of a batch, a reader each: batches ahead fill the others, and few threads want the interpreter at once


class FileStorage:
    """Images as stretches of files. One that cannot be read, or is in a file that changed
    since it was indexed, comes back as Unreadable in its place."""

    def __init__(self, manifest: Manifest):
        self._manifest = manifest
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="read")

    def read(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8] | BadImage]:
        """The bytes of these rows, in order: uint8 [length] each, or [height, width, 3] where they are pixels."""
        return self.start(rows)()

    def start(self, rows: NDArray[np.int64]) -> Callable[[], list[NDArray[np.uint8] | BadImage]]:
        """Begin to read these rows; what it returns waits for them, and gives what `read` does."""
        found: list[Any] = [None] * len(rows)
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

    def _read_some(self, wanted: list[tuple[int, ...]], found: list[Any]) -> None:
        with _OpenFile(self._manifest) as file:
            for at, row, number, offset, length in wanted:
                found[at] = self._read_one(file, row, number, offset, length)

    def _read_one(
        self, file: "_OpenFile", row: int, number: int, offset: int, want: int
    ) -> NDArray[np.uint8] | BadImage:
        try:
            handle, changed, size = file.of(number, row)
        except OSError as error:
            return Unreadable(f"cannot be opened ({error.strerror})")
        if not changed and (size < offset + want or (size != want and not offset)):  # a shard's images have an offset
            changed = f"changed: {size} bytes, {offset + want} when indexed"
        if changed:
            return Unreadable(changed)
        buffer = np.empty(want, np.uint8)
        try:
            got = again(os.preadv, handle, [buffer.data], offset)
        except OSError as error:
            return Unreadable(f"cannot be read ({error.strerror})")
        if got != want:
            return Unreadable(f"ended after {got} of {want} bytes")
        if self._manifest.kind[row] == _RAW:
            return buffer.reshape(int(self._manifest.height[row]), int(self._manifest.width[row]), 3)
        return buffer


class _OpenFile:
    """The file a reader is at: a shard is opened once for the neighbours in it."""

    def __init__(self, manifest: Manifest):
        self._manifest, self._number, self._handle = manifest, -1, -1
        self._changed, self._size = "", -1

    def __enter__(self) -> "_OpenFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def of(self, number: int, row: int) -> tuple[int, str, int]:
        """Handle of file `number`, which row is in, what says that it changed, and its size. Raises OSError."""
        if number != self._number:
            self._close()
            self._handle = again(os.open, self._manifest.path(row), os.O_RDONLY)
            state = os.fstat(self._handle)
            self._number, self._size = number, state.st_size
            self._changed = self._manifest.change(number, state.st_size, state.st_mtime_ns)
        return self._handle, self._changed, self._size

    def _close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
        self._number = self._handle = -1
