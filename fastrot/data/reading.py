"""Reading from a disk that may stumble: a read error may pass, what the bytes say stays."""

import errno
import os
import stat
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastrot.errors import Fault, UserError
from fastrot.files import Damaged
from fastrot.remote import Entry
from fastrot.remote import file as far
from fastrot.remote.file import file_at

GONE, IRREGULAR = -1, -2  # a state of a name without a file, and of a folder, pipe or device
_ASKING = 16  # threads that ask a file system
_BLOCK = 1024  # files a thread asks for at once
T = TypeVar("T")
P = ParamSpec("P")
# what a file system says of a name and of our rights: asking again gives the same answer
_LASTING = frozenset(
    (
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EACCES,
        errno.EPERM,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.EINVAL,
    )
)
_PAUSES_S = (0.1, 1.0)  # before the second try and the third


def again(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `work` returns, tried three times where the system refuses it. Raises its last OSError."""
    for pause in _PAUSES_S:
        try:
            return work(*args, **kwargs)
        except OSError as error:
            if error.errno is None or error.errno in _LASTING:
                raise
            time.sleep(pause)
    return work(*args, **kwargs)


def refusal(line: str, error: OSError) -> UserError | Fault:
    """What to raise for a read error: the user's to mend (a name, a right), or the machine's."""
    kind = UserError if error.errno in _LASTING else Fault
    return kind(f"{line} ({error.strerror or error})")


def is_far(path: bytes) -> bool:
    """Whether a file's name is an address: paths are absolute."""
    return b"://" in path and not path.startswith(b"/")


def state_of(entry: Entry) -> tuple[int, int]:
    """Size and time of a file at a distance, as `states` has them; of one without a time, what changes with its bytes."""
    return entry.size or 0, int((entry.time or zlib.crc32(entry.version.encode())) * 10**9)


def states(paths: list[bytes]) -> NDArray[np.int64]:
    """Size in bytes and modification time in ns of each file, int64 [n, 2]; GONE or IRREGULAR where it has none.

    Raises UserError or Fault where the system cannot tell.
    """
    if paths and is_far(paths[0]):
        with ThreadPoolExecutor(_ASKING) as pool:
            found = [state_of(entry) for _, entry in pool.map(file_at, map(os.fsdecode, paths))]
        return np.array(found, np.int64)
    if len(paths) <= _BLOCK:
        return _states(paths)
    blocks = [paths[at : at + _BLOCK] for at in range(0, len(paths), _BLOCK)]
    with ThreadPoolExecutor(_ASKING) as pool:  # a network's file system answers many at once
        return np.concatenate([*pool.map(_states, blocks)])


def _states(paths: list[bytes]) -> NDArray[np.int64]:
    found = np.empty((len(paths), 2), np.int64)
    for at, path in enumerate(paths):
        try:
            state = again(os.stat, path)
        except (FileNotFoundError, NotADirectoryError):
            found[at] = GONE
        except OSError as error:
            raise refusal(f"{os.fsdecode(path)}: cannot be read", error) from None
        else:
            found[at] = (state.st_size, state.st_mtime_ns) if stat.S_ISREG(state.st_mode) else IRREGULAR
    return found


def exists(path: str | bytes) -> bool:
    """Whether a file or folder is there. Raises UserError or Fault where the system cannot tell."""
    try:
        again(os.stat, path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise refusal(f"{os.fsdecode(path)}: cannot be read", error) from None
    return True


def open_regular(path: str | bytes) -> int:
    """A handle for reading a regular file. Raises OSError; a pipe or a device is one, not a wait."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # without it a pipe's open waits for a writer
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return handle


@contextmanager
def opened(path: bytes) -> Iterator[BinaryIO]:
    """A regular file, here or at an address, for reading. Raises OSError; UserError or Fault of what is at a distance."""
    if is_far(path):
        yield far.opened(os.fsdecode(path))
        return
    with open(path, "rb", opener=lambda path, _: open_regular(path)) as file:
        yield file


def mapped(path: Path) -> np.memmap[Any, np.dtype[Any]]:
    """The array of an .npy file, mapped to read. Raises OSError; Damaged, a ValueError, where it is none."""
    try:
        array: np.memmap[Any, np.dtype[Any]] = np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception as error:  # a header is an expression of Python's, whose parser raises nearly any type
        raise Damaged(f"not a plain numpy array ({str(error).partition(chr(10))[0]})") from None
    return array


def read_text_file(path: str | bytes) -> bytes:
    """All of a small regular file. Raises OSError."""
    with os.fdopen(again(open_regular, path), "rb") as file:
        return file.read()
