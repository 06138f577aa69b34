"""reader: stretches of files read into memory by threads, a batch a call, without the GIL."""

import ctypes
import functools
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastrot_kernels.build import library

PENDING, READ, LEFT = range(3)
ANY_SIZE, ANY_TIME = -1, -(2**63)
REQUEST = np.dtype(
    [
        ("path", np.uintp),
        ("path_length", np.int64),
        ("file", np.int64),
        ("offset", np.int64),
        ("length", np.int64),
        ("size", np.int64),
        ("time", np.int64),
        ("out", np.uintp),
    ],
    align=True,
)
"""path, path_length: where its bytes lie; file: equal where the path is; offset, length: the stretch; size, time: of the
file, bytes and ns, as expected, or ANY; out: where the stretch goes."""
_ENDS_S = 1.0  # a thread that a frozen disk holds is not waited for


class _Started(NamedTuple):
    """A batch of the threads': its memory stays until none of them writes into it."""

    ticket: int
    requests: NDArray[np.void]
    outcomes: NDArray[np.uint8]
    keep: object


_held: list[_Started] = []  # what threads of closed readers may yet write into


@functools.cache
def _library() -> ctypes.CDLL:
    made = library(Path(__file__).parent, "reader")
    made.reader_open.restype = made.reader_start.restype = ctypes.c_void_p
    made.reader_start.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    made.reader_wait.argtypes = made.reader_forget.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    made.reader_wait.restype = made.reader_forget.restype = ctypes.c_bool
    made.reader_close.argtypes, made.reader_free.argtypes = [ctypes.c_void_p, ctypes.c_double], [ctypes.c_void_p]
    made.reader_free.restype = None
    return made


class Reading:
    """A batch that is being read; dropped before it is done, what is left of it is not read."""

    def __init__(self, reader: "Reader", started: _Started):
        self._reader, self._started = reader, started

    def result(self) -> NDArray[np.uint8]:
        """Once all were tried: READ or LEFT each, uint8 [n]. Raises RuntimeError where the reader was closed before."""
        if not self._reader._library.reader_wait(self._reader._pool, self._started.ticket):
            raise RuntimeError("the reader is closed")
        return self._started.outcomes

    @property
    def pending(self) -> int | None:
        """The first of the requests that is not done, which is the longest under way; None where all are."""
        left = np.flatnonzero(self._started.outcomes == PENDING)
        return int(left[0]) if len(left) else None

    def __del__(self) -> None:
        self._reader._let_go(self._started)


class Reader:
    """Threads that read the batches started, oldest first; any thread may start and wait.

    Raises BuildError where it cannot be compiled, MemoryError where threads cannot be had.
    """

    def __init__(self, threads: int):
        self._pool, self._process = None, os.getpid()
        self._library = _library()
        self._dropped: list[_Started] = []  # with a read under way
        self._pool = self._library.reader_open(threads)
        if not self._pool:
            raise MemoryError(f"{threads} reading threads cannot be started")

    def start(self, requests: NDArray[np.void], keep: object) -> Reading:
        """Begin to read stretches, REQUEST [n], neighbours of a file together. keep: what they point into."""
        dropped, self._dropped = self._dropped, []
        for one in dropped:
            self._let_go(one)
        outcomes = np.zeros(len(requests), np.uint8)
        ticket = self._library.reader_start(self._pool, len(requests), requests.ctypes.data, outcomes.ctypes.data)
        if not ticket:
            raise MemoryError("no memory for a batch")
        return Reading(self, _Started(ticket, requests, outcomes, keep))

    def close(self) -> None:
        """End the threads; what is in flight is lost."""
        if self._pool and os.getpid() == self._process:  # a forked child has no such threads
            self._library.reader_close(self._pool, _ENDS_S)

    def _let_go(self, started: _Started) -> None:
        here = self._pool and os.getpid() == self._process
        if here and not self._library.reader_forget(self._pool, started.ticket):
            self._dropped.append(started)

    def __del__(self) -> None:
        self.close()
        if self._pool and os.getpid() == self._process:
            stuck, self._dropped = self._dropped, []
            for one in stuck:
                self._let_go(one)
            _held.extend(self._dropped)
            self._library.reader_free(self._pool)
            self._pool = None
