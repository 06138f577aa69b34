"""Many rows looked at in parallel, part by part; finished parts are kept, so that a killed run goes on."""

import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from fastrot.data.reading import again, refusal
from fastrot.errors import Fault, Unreadable, UserError
from fastrot.files import as_json, replacing
from fastrot.watch import die_with_parent

Track = Callable[[Iterable[Any], int, str], Iterable[Any]]
"""track(items, total, title) -> the items: shows progress."""
Look = Callable[..., tuple[int, int, int, int, int, bytes] | str]
_Missing = dict[int, OSError | Unreadable]  # by row of a part: why nothing could be said of it
_Part = tuple[int, Path, _Missing]
ROWS = 2048  # a part: what a kill may cost a worker
_MANY = 4096  # rows above which processes beat threads
_FOUND = np.dtype(
    [("height", "<i4"), ("width", "<i4"), ("kind", "u1"), ("orientation", "u1"), ("coding", "u1"), ("head", "u1", 32)]
)


@dataclass(frozen=True)
class Found:
    """What looking at n rows gave.

    height, width int32 [n]; kind, orientation, coding uint8 [n]; head uint8 [n, 32], sha256 of the image's first bytes.
    sound   bool [n]; the other columns are 0 where it is False.
    reason  by row: why it is no sound image.
    """

    height: NDArray[np.int32]
    width: NDArray[np.int32]
    kind: NDArray[np.uint8]
    orientation: NDArray[np.uint8]
    coding: NDArray[np.uint8]
    head: NDArray[np.uint8]
    sound: NDArray[np.bool_]
    reason: dict[int, str]


def look_at(
    n: int,
    words_of: Callable[[int, int], Iterable[tuple[Any, ...]]],
    look: Look,
    folder: Path,
    track: Track,
    title: str,
    name_of: Callable[[int], str] = "row {}".format,
) -> Found:
    """`look` at rows 0 .. n - 1.

    words_of(first, last)  the arguments of `look` for these rows, an iterable of tuples.
    look(*arguments)       (height, width, kind, orientation, coding, sha256) of a row, or the reason why it is unsound; picklable.
                           It raises OSError or Unreadable where nothing can be said of the row now: it is tried again.
    folder                 keeps the parts that are done; the caller removes it. A part found there is not redone.
    name_of(row)           a row's place, for a person.
    Raises UserError or Fault, after all other rows, where some could not be read; Fault where a worker dies.
    """
    table = np.zeros(n, _FOUND)
    reason: dict[int, str] = {}
    unread: dict[int, OSError | Unreadable] = {}
    workers = len(os.sched_getaffinity(0))
    rows = ROWS if n > _MANY else max(1, min(256, n // (workers * 4)))
    folder.mkdir(parents=True, exist_ok=True)
    with workers_pool(n > _MANY) as pool:
        parts = _parts(pool, n, rows, words_of, look, folder, 2 * workers)
        try:
            for first, part, missing in track(parts, -(-n // rows), f"{title}, {n:,} images in parts of {rows:,}"):
                unread |= {first + row: error for row, error in missing.items()}
                if not missing:
                    some, why = _read(part)
                    table[first : first + rows] = some
                    reason |= {first + int(row): line for row, line in why.items()}
        except BrokenProcessPool:
            raise Fault(
                f"{title}: a worker process died (out of memory, or killed); start again: what was done is kept"
            ) from None
    if unread:
        raise _unread(title, unread, name_of)
    sound = np.ones(n, bool)
    sound[list(reason)] = False
    return Found(**{name: table[name] for name in _FOUND.names or ()}, sound=sound, reason=reason)


def _unread(title: str, unread: dict[int, OSError | Unreadable], name_of: Callable[[int], str]) -> UserError | Fault:
    """The line for rows of which nothing could be said."""
    row = min(unread)
    error = unread[row]
    line = f"{title}: {name_of(row)}" + (f" and {len(unread) - 1:,} more" if len(unread) > 1 else "")
    if isinstance(error, Unreadable):
        return UserError(f"{line}: {error}; start again: what was done is kept")
    return refusal(f"{line}: cannot be read; mend it and start again: what was done is kept", error)


class _Worker(ForkServerProcess):
    """A process that does not run the caller's script again, as multiprocessing's would to find functions in it."""

    @staticmethod
    def _Popen(process: BaseProcess) -> Any:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            return ForkServerProcess._Popen(process)
        finally:
            sys.modules["__main__"] = main


class _WithoutMain(ForkServerContext):
    Process = _Worker


def workers_pool(processes: bool) -> Executor:
    """As many workers as this process has cores: processes, which end with this one, or threads."""
    workers = len(os.sched_getaffinity(0))
    if processes:
        return ProcessPoolExecutor(workers, _WithoutMain(), initializer=die_with_parent)
    return ThreadPoolExecutor(workers)


def _parts(
    pool: Executor,
    n: int,
    rows: int,
    words_of: Callable[[int, int], Iterable[tuple[Any, ...]]],
    look: Look,
    folder: Path,
    most: int,
) -> Iterator[_Part]:
    """(first row, file, what could not be read) of every part, in order; at most `most` in flight, so that memory
    stays small."""
    flying: deque[tuple[int, Path, Future[_Missing] | None]] = deque()
    for first in range(0, n, rows):
        last = min(first + rows, n)
        part = folder / f"{first}-{last}.npz"
        done = None if part.exists() else pool.submit(_look, list(words_of(first, last)), look, part)
        flying.append((first, part, done))
        while len(flying) > most:
            yield _finished(*flying.popleft())
    while flying:
        yield _finished(*flying.popleft())


def _read(part: Path) -> tuple[NDArray[Any], dict[str, str]]:
    try:
        with part.open("rb") as file, np.load(file) as saved:
            return saved["found"], as_json(saved["reasons"].tobytes(), dict[str, str])
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise UserError(f"{part}: damaged ({error}); remove {part.parent} and start again") from None


def _finished(first: int, part: Path, done: Future[_Missing] | None) -> _Part:
    return first, part, {} if done is None else done.result()


def _look(words: list[tuple[Any, ...]], look: Look, part: Path) -> _Missing:
    """Look at one part's rows and write what was found; the file appears whole or not at all.

    Returns the rows of which nothing could be said: then it is not written.
    """
    table = np.zeros(len(words), _FOUND)
    reasons: dict[int, str] = {}
    missing: _Missing = {}
    for row, arguments in enumerate(words):
        try:
            found = again(look, *arguments)
        except (OSError, Unreadable) as error:
            missing[row] = error
            continue
        if isinstance(found, str):
            reasons[row] = found
        else:
            table[row] = (*found[:-1], np.frombuffer(found[-1], np.uint8))
    if not missing:
        with replacing(part) as scratch, scratch.open("wb") as file:
            np.savez(file, found=table, reasons=np.frombuffer(json.dumps(reasons).encode(), np.uint8))
    return missing
