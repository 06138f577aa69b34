"""Many rows looked at in parallel, part by part; finished parts are kept, so that a killed run goes on."""

import json
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from fastrot.errors import Fault, UserError

ROWS = 2048  # a part: what a kill may cost a worker
_MANY = 4096  # rows above which processes beat threads
_FOUND = np.dtype([("height", "<i4"), ("width", "<i4"), ("kind", "u1"), ("orientation", "u1"), ("head", "u1", 32)])


@dataclass(frozen=True)
class Found:
    """What looking at n rows gave.

    height, width int32 [n]; kind, orientation uint8 [n]; head uint8 [n, 32], sha256 of the image's first bytes.
    sound   bool [n]; the other columns are 0 where it is False.
    reason  by row: why it is no sound image.
    """

    height: NDArray[np.int32]
    width: NDArray[np.int32]
    kind: NDArray[np.uint8]
    orientation: NDArray[np.uint8]
    head: NDArray[np.uint8]
    sound: NDArray[np.bool_]
    reason: dict[int, str]


def look_at(n: int, words_of: Callable, look: Callable, folder: Path, track: Callable, title: str) -> Found:
    """`look` at rows 0 .. n - 1.

    words_of(first, last)  the arguments of `look` for these rows, an iterable of tuples.
    look(*arguments)       (height, width, kind, orientation, sha256) of a row, or the reason why it is unsound; picklable.
    folder                 keeps the parts that are done; the caller removes it. A part found there is not redone.
    Raises Fault where a worker dies.
    """
    table, reason = np.zeros(n, _FOUND), {}
    workers = len(os.sched_getaffinity(0))
    rows = ROWS if n > _MANY else max(1, min(256, n // (workers * 4)))
    folder.mkdir(parents=True, exist_ok=True)
    with workers_pool(n > _MANY) as pool:
        parts = _parts(pool, n, rows, words_of, look, folder, 2 * workers)
        try:
            for first, part in track(parts, -(-n // rows), f"{title}, {n:,} images in parts of {rows:,}"):
                some, why = _read(part)
                table[first : first + rows] = some
                reason |= {first + int(row): line for row, line in why.items()}
        except BrokenProcessPool:
            raise Fault(
                f"{title}: a worker process died (out of memory, or killed); start again: what was done is kept"
            ) from None
    sound = np.ones(n, bool)
    sound[list(reason)] = False
    return Found(*(table[name] for name in ("height", "width", "kind", "orientation", "head")), sound, reason)


def workers_pool(processes: bool) -> Executor:
    """As many workers as this process has cores: processes, which end with this one, or threads."""
    workers = len(os.sched_getaffinity(0))
    if processes:
        return ProcessPoolExecutor(workers, get_context("forkserver"), initializer=_die_with_parent)
    return ThreadPoolExecutor(workers)


def _die_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""

    def watch() -> None:
        parent_process().join()
        os._exit(Fault.exit_code)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _parts(pool, n, rows, words_of, look, folder, most) -> Iterator[tuple[int, Path]]:
    """(first row, file) of every part, in order; at most `most` in flight, so that memory stays small."""
    flying: deque = deque()
    for first in range(0, n, rows):
        last = min(first + rows, n)
        part = folder / f"{first}-{last}.npz"
        done = None if part.exists() else pool.submit(_look, list(words_of(first, last)), look, part)
        flying.append((first, part, done))
        while len(flying) > most:
            yield _finished(*flying.popleft())
    while flying:
        yield _finished(*flying.popleft())


def _read(part: Path) -> tuple[NDArray, dict[str, str]]:
    try:
        with part.open("rb") as file, np.load(file) as saved:
            return saved["found"], json.loads(saved["reasons"].tobytes())
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise UserError(f"{part}: damaged ({error}); remove {part.parent} and start again") from None


def _finished(first, part, done) -> tuple[int, Path]:
    if done is not None:
        done.result()
    return first, part


def _look(words: list[tuple], look: Callable, part: Path) -> None:
    """Look at one part's rows and write what was found; the file appears whole or not at all."""
    table, reasons = np.zeros(len(words), _FOUND), {}
    for row, arguments in enumerate(words):
        found = look(*arguments)
        if isinstance(found, str):
            reasons[row] = found
        else:
            table[row] = (*found[:4], np.frombuffer(found[4], np.uint8))
    scratch = part.with_name(f".{part.stem}-{os.getpid()}.npz")
    np.savez(scratch, found=table, reasons=np.frombuffer(json.dumps(reasons).encode(), np.uint8))
    scratch.replace(part)
