"""A file at a distance that is read like one on a disk, block by block."""

import io
import threading
from typing import BinaryIO

from fastrot.errors import UserError
from fastrot.remote.address import open_store
from fastrot.remote.store import Entry, Store

BLOCK = 8 << 20  # bytes read ahead
_kept = threading.local()  # the file a thread has read last


def file_at(address: str) -> tuple[Store, Entry]:
    """The store of a file's folder, and the file. Raises UserError, Fault."""
    folder, _, name = address.rpartition("/")
    store = open_store(folder)
    return store, store.info(name)


def stretch(store: Store, entry: Entry, start: int, end: int) -> bytes:
    """Bytes start to end of a file, or to its own. Raises UserError where they cannot be had alone; Fault."""
    data = store.read(entry, start, end).data
    if data is None:
        raise UserError(f"{store.at(entry.name)}: its server ignores ranges; stage it")
    return data


def opened(address: str) -> BinaryIO:
    """For reading; a thread's last stays open, since who reads one image reads its neighbour next. Raises UserError,
    Fault."""
    if getattr(_kept, "address", None) != address:
        _kept.file = io.BufferedReader(_Ranges(*file_at(address)), BLOCK)
        _kept.address = address
    file: BinaryIO = _kept.file
    file.seek(0)
    return file


class _Ranges(io.RawIOBase):
    def __init__(self, store: Store, entry: Entry):
        self._store, self._entry, self._at = store, entry, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._entry.size or 0)[whence]
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # as BufferedReader calls it
        end = min(self._at + len(buffer), self._entry.size or 0)
        if end <= self._at:
            return 0
        buffer[: end - self._at] = stretch(self._store, self._entry, self._at, end)
        self._at, read = end, end - self._at
        return read
