"""Reading image bytes: positioned reads, many at once, never mapped; a batch's into one stretch of memory."""

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrot.data.images import KINDS
from fastrot.data.manifest import Manifest
from fastrot.data.ranges import Ranges
from fastrot.data.reading import again, is_far, open_regular
from fastrot.errors import BadImage, Unreadable
from fastrot_kernels import reader
from fastrot_kernels.arenas import Arenas
from fastrot_kernels.build import BuildError

log = logging.getLogger(__name__)

Buffers = list[NDArray[np.uint8] | BadImage]
READERS = 8  # concurrent reads a rank: enough to keep an SSD's queue filled
_RAW = KINDS.index("RAW")
_PARTS = 2  # of a batch, a reader of Python each: batches ahead fill the others, and few threads want the interpreter
_APART = 64  # bytes: images begin on a line of the cache


class Reading:
    """Rows that are being read; called, it waits for them and gives what `FileStorage.read` does."""

    def __init__(self, manifest: Manifest, rows: NDArray[np.int64], finish: Callable[[], Buffers]):
        self._manifest, self._rows, self._finish = manifest, rows, finish
        self.pending: Callable[[], int | None] = lambda: None
        """Position among the rows of the first that is not read yet."""

    def __call__(self) -> Buffers:
        return self._finish()

    @property
    def at(self) -> str:
        """The file that is waited for, for a person."""
        pending = self.pending()
        return self._manifest.name(int(self._rows[pending])) if pending is not None else ""


class FileStorage:
    """Images as stretches of files. One that cannot be read, or is in a file that changed
    since it was indexed, comes back as Unreadable in its place.

    Of files at a distance what cannot be read raises UserError or Fault: a store that fails says nothing of an image.

    readers  images read at once.  pinned  whether memory is page-locked, as a GPU's decoder likes it.
    Where the reader in C cannot be compiled Python reads, which is said; Python also reads again, and says what is
    wrong, where C did not find an image as expected.
    blocks   of files at a distance: as for Ranges.
    """

    def __init__(self, manifest: Manifest, readers: int = READERS, pinned: bool = False, blocks: bool = False):
        self._manifest = manifest
        self._pool = ThreadPoolExecutor(readers, thread_name_prefix="read")
        self._arenas = Arenas(pinned)
        self._names = np.ascontiguousarray(manifest.names)
        self._reader: reader.Reader | None = None
        self._ranges = Ranges(manifest, blocks) if is_far(manifest.path(0)) else None
        if self._ranges:
            return
        try:
            self._reader = reader.Reader(readers)
        except BuildError as error:
            log.warning("files are read by Python, which takes more of the interpreter's time (%s)", error)

    def read(self, rows: NDArray[np.int64]) -> Buffers:
        """The bytes of these rows, in order: uint8 [length] each, or [height, width, 3] where they are pixels. They
        are views of one stretch of memory, which is used again once none of them is left."""
        return self.start(rows)()

    def start(self, rows: NDArray[np.int64]) -> Reading:
        """Begin to read these rows; what it returns waits for them."""
        if self._ranges:
            return self._by_ranges(self._ranges, rows)
        return self._by_python(rows) if self._reader is None else self._by_c(self._reader, rows)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._reader:
            self._reader.close()
        if self._ranges:
            self._ranges.close()

    def _by_ranges(self, made: Ranges, rows: NDArray[np.int64]) -> Reading:
        arena, starts = self._room(rows)
        bounds = zip(starts.tolist(), (starts + self._manifest.length[rows]).tolist(), strict=True)
        found: list[Any] = [arena[start:end] for start, end in bounds]
        wait, pending = made.start(rows, found.copy())

        def finish() -> Buffers:
            wait()
            for at in np.flatnonzero(self._manifest.kind[rows] == _RAW).tolist():
                found[at] = self._shaped(found[at], int(rows[at]))
            return found

        reading = Reading(self._manifest, rows, finish)
        reading.pending = pending
        return reading

    def _room(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """One stretch of memory for these rows, and where in it each begins."""
        aligned = -(-self._manifest.length[rows] // _APART) * _APART
        ends = np.cumsum(aligned)
        return self._arenas.take(int(ends[-1]) if len(ends) else 0), ends - aligned

    def _by_c(self, made: reader.Reader, rows: NDArray[np.int64]) -> Reading:
        order = np.argsort(self._manifest.file[rows], kind="stable")  # neighbours of a file together
        length = self._manifest.length[rows]
        arena, starts = self._room(rows)
        started = made.start(self._requests(rows[order], arena.ctypes.data + starts[order]), (arena, self._names))

        def finish() -> Buffers:
            outcomes = started.result()
            bounds = zip(starts.tolist(), (starts + length).tolist(), strict=True)
            found: list[Any] = [arena[start:end] for start, end in bounds]
            for at in np.flatnonzero(self._manifest.kind[rows] == _RAW).tolist():
                found[at] = self._shaped(found[at], int(rows[at]))
            if not (left := order[outcomes != reader.READ]).size:
                return found
            for at, buffer in zip(left.tolist(), self._by_python(rows[left])(), strict=True):
                found[at] = buffer
            return found

        def pending() -> int | None:
            at = started.pending
            return None if at is None else int(order[at])

        reading = Reading(self._manifest, rows, finish)
        reading.pending = pending
        return reading

    def _requests(self, rows: NDArray[np.int64], out: NDArray[np.int64]) -> NDArray[np.void]:
        """What the reader in C is asked for. out: addresses."""
        m, requests = self._manifest, np.empty(len(rows), reader.REQUEST)
        file = m.file[rows]
        starts, ends = m.name_spans(file)
        requests["path"], requests["path_length"] = self._names.ctypes.data + starts, ends - starts
        requests["file"], requests["out"] = file, out
        requests["offset"], requests["length"] = m.offset[rows], m.length[rows]
        if m.file_state is not None:
            requests["size"], requests["time"] = m.file_state[file].T
        else:  # a file that is one image has its size; a shard's images have an offset
            requests["size"] = np.where(requests["offset"] == 0, requests["length"], reader.ANY_SIZE)
            requests["time"] = reader.ANY_TIME
        return requests

    def _by_python(self, rows: NDArray[np.int64]) -> Reading:
        found: list[Any] = [None] * len(rows)
        parts = [self._pool.submit(self._read_some, wanted, found) for wanted in self._dealt(rows)]

        def finish() -> Buffers:
            for part in parts:
                part.result()
            return found

        reading = Reading(self._manifest, rows, finish)
        reading.pending = lambda: next((at for at, buffer in enumerate(found) if buffer is None), None)
        return reading

    def _shaped(self, buffer: NDArray[np.uint8], row: int) -> NDArray[np.uint8]:
        return buffer.reshape(int(self._manifest.height[row]), int(self._manifest.width[row]), 3)

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
            return self._shaped(buffer, row)
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
            self._handle = again(open_regular, self._manifest.path(row))
            state = os.fstat(self._handle)
            self._number, self._size = number, state.st_size
            self._changed = self._manifest.change(number, state.st_size, state.st_mtime_ns)
        return self._handle, self._changed, self._size

    def _close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
        self._number = self._handle = -1
