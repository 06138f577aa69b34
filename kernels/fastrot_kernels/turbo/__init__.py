"""turbo: windows of JPEGs, decoded and resampled on the CPU, a batch a call, without the GIL.

Our own Huffman decoder passes over what lies outside the window, libjpeg-turbo makes pixels of the
window's columns and rows alone, and a pass of SIMD code resamples the rows as they come. Pixels equal torchvision's decode, crop and
antialiased bilinear resize bit for bit; with `fast`, large windows are first scaled in the DCT.
"""

import ctypes
import functools
import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastrot_kernels.arenas import Arenas
from fastrot_kernels.build import library

DONE, NOT_OURS, BROKEN = range(3)
_REASON = 96
_REQUEST = np.dtype(
    [
        ("data", np.uintp),
        ("length", np.int64),
        ("raw", np.int32, 2),
        ("window", np.float64, 4),
        ("boxed", np.int32),
        ("fast", np.int32),
        ("size", np.int32),
        ("orientation", np.int32),
        ("out", np.uintp),
    ],
    align=True,
)


@functools.cache
def _library(*flags: str) -> ctypes.CDLL:
    made = library(Path(__file__).parent, "turbo", links=("jpeg",), flags=flags)
    made.turbo_open.restype = made.turbo_submit.restype = ctypes.c_void_p
    made.turbo_submit.argtypes = [ctypes.c_void_p, ctypes.c_int, *3 * [ctypes.c_void_p]]
    made.turbo_wait.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    made.turbo_close.argtypes = [ctypes.c_void_p]
    made.turbo_wait.restype = made.turbo_close.restype = None
    return made


class _Flying(NamedTuple):
    """A batch that the threads work on: its memory stays until they are done."""

    ticket: int
    buffers: list[NDArray[np.uint8]]
    requests: NDArray[np.void]
    out: NDArray[np.uint8]
    outcomes: NDArray[np.uint8]
    reasons: NDArray[np.uint8]


class Turbo:
    """Threads that decode the batches submitted, oldest first.

    threads  of the operating system; fast: scale windows of twice the target and more in the DCT.
    Raises BuildError where it cannot be compiled, MemoryError where threads cannot be had.
    """

    def __init__(self, threads: int, fast: bool = False):
        self._pool, self._process = None, os.getpid()
        self._in_use = threading.Lock()  # a thread that still submits or waits keeps the pool from being closed
        self._library, self._fast = _library(), fast
        self._pool = self._library.turbo_open(threads)
        if not self._pool:
            raise MemoryError(f"{threads} decoding threads cannot be started")
        self._flying: deque[_Flying] = deque()
        self._outputs = Arenas(pinned=False)

    def submit(
        self,
        buffers: list[NDArray[np.uint8]],
        orientations: NDArray[np.uint8],
        windows: NDArray[np.int32] | NDArray[np.float64],
        size: int,
    ) -> None:
        """Start on a batch.

        buffers  uint8 [length], a JPEG; or uint8 [height, width, 3], pixels.
        orientations  uint8 [n], EXIF's 1..8 of the stored pixels; what the files say of it is not read.
        windows  of the upright image: int32 [n, 4] (top, left, height, width), cropped then resized; float64: boxes whose taps
                 may lie outside, as Pillow's `resize(box=)`.
        """
        n = len(buffers)
        out = self._outputs.take(n * size * size * 3).reshape(n, size, size, 3)
        outcomes, reasons = np.empty(n, np.uint8), np.zeros((n, _REASON), np.uint8)
        requests = np.zeros(n, _REQUEST)
        buffers = [np.ascontiguousarray(buffer) for buffer in buffers]
        requests["data"] = [buffer.ctypes.data for buffer in buffers]
        requests["length"] = [buffer.size for buffer in buffers]
        requests["raw"] = np.reshape([buffer.shape[:2] if buffer.ndim == 3 else (0, 0) for buffer in buffers], (n, 2))
        requests["window"] = windows
        requests["boxed"] = windows.dtype == np.float64
        requests["fast"] = self._fast
        requests["size"] = size
        requests["orientation"] = orientations
        requests["out"] = out.ctypes.data + np.arange(n) * (size * size * 3)
        pointers = (requests.ctypes.data, outcomes.ctypes.data, reasons.ctypes.data)
        with self._opened() as pool:
            ticket = self._library.turbo_submit(pool, n, *pointers)
        if not ticket:
            raise MemoryError("no memory for a batch")
        self._flying.append(_Flying(ticket, buffers, requests, out, outcomes, reasons))

    def result(self) -> tuple[NDArray[np.uint8], dict[int, tuple[int, str]]]:
        """The oldest batch: uint8 [n, size, size, 3], and {position: (NOT_OURS or BROKEN, reason)} of
        images without pixels."""
        batch = self._flying.popleft()
        with self._opened() as pool:
            self._library.turbo_wait(pool, batch.ticket)
        failed = np.flatnonzero(batch.outcomes).tolist()
        said = {at: bytes(batch.reasons[at]).partition(b"\0")[0].decode("ascii", "replace") for at in failed}
        return batch.out, {at: (int(batch.outcomes[at]), reason) for at, reason in said.items()}

    @contextmanager
    def _opened(self) -> Iterator[int]:
        """The pool, which nobody closes meanwhile."""
        with self._in_use:
            if not self._pool:
                raise RuntimeError("turbo is closed")
            yield self._pool

    def close(self) -> None:
        """End the threads; what is in flight is lost."""
        if self._pool and os.getpid() == self._process:  # a forked child has no such threads
            with self._in_use:
                self._library.turbo_close(self._pool)
                self._pool = None

    def __del__(self) -> None:
        self.close()  # before the memory that its threads write into goes
