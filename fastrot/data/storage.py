"""Reading image bytes: positioned reads, many at once, never mapped."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from fastrot.data.faults import KINDS
from fastrot.data.manifest import Manifest
from fastrot.errors import BadImage

_RAW = KINDS.index("RAW")
_READERS = 8  # concurrent reads a rank: enough to keep an SSD's queue filled


class FileStorage:
    """Images as stretches of files. One that cannot be read comes back as a BadImage in its place."""

    def __init__(self, manifest: Manifest):
        self._manifest = manifest
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="read")

    def read(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8] | BadImage]:
        """The bytes of these rows, in order: uint8 [length] each, or [height, width, 3] where they are pixels."""
        return list(self._pool.map(self._read_one, rows.tolist()))

    def advise(self, rows: NDArray[np.int64]) -> None:
        """Tell the kernel that these rows are wanted soon; returns at once."""
        for row in rows.tolist():
            self._pool.submit(self._advise_one, row)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _read_one(self, row: int) -> NDArray[np.uint8] | BadImage:
        want, offset = int(self._manifest.length[row]), int(self._manifest.offset[row])
        try:
            file = os.open(self._manifest.path(row), os.O_RDONLY)
        except OSError as error:
            return BadImage(f"cannot be opened ({error.strerror})")
        try:
            size = os.fstat(file).st_size
            if size < offset + want or (size != want and not offset):  # a shard's images have an offset
                return BadImage(f"changed: {size} bytes, {offset + want} when indexed")
            buffer = np.empty(want, np.uint8)
            got = os.preadv(file, [buffer], offset)
        except OSError as error:
            return BadImage(f"cannot be read ({error.strerror})")
        finally:
            os.close(file)
        if got != want:
            return BadImage(f"ended after {got} of {want} bytes")
        if self._manifest.kind[row] == _RAW:
            return buffer.reshape(int(self._manifest.height[row]), int(self._manifest.width[row]), 3)
        return buffer

    def _advise_one(self, row: int) -> None:
        try:
            file = os.open(self._manifest.path(row), os.O_RDONLY)
        except OSError:
            return  # the read to come will say so
        try:
            offset, length = int(self._manifest.offset[row]), int(self._manifest.length[row])
            os.posix_fadvise(file, offset, length, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(file)
