"""A large file that comes in pieces, in any order, and goes on where it was cut."""

import os
import threading
import zlib
from pathlib import Path

from fastrot.files import digest_of
from fastrot.remote import Entry, Store

PIECE = 8 << 20  # bytes


class Pieces:
    """`.part-NAME` beside a file, and `.part-NAME.done`: a line of what file it is, then `number CRC` of each piece that is
    there. A kill in between costs pieces, never their truth: they are read again and must have their CRC."""

    def __init__(self, store: Store, entry: Entry, path: Path):
        assert entry.size is not None
        self._store, self._entry, self._path, self.size = store, entry, path, entry.size
        self.scratch = path.with_name(f".part-{path.name}")
        self._notes = path.with_name(f".part-{path.name}.done")
        self._title = f"{entry.size} {entry.version!r}\n"
        self._lock = threading.Lock()
        self._missing = set(range(-(-self.size // PIECE)))
        self._take_up()
        self.there = -(-self.size // PIECE) - len(self._missing)

    @staticmethod
    def begun(path: Path) -> bool:
        """Whether a process before this one has left pieces of a file."""
        return path.with_name(f".part-{path.name}.done").exists()

    def missing(self) -> list[int]:
        """Numbers of the pieces that are not there."""
        return sorted(self._missing)

    def fetch(self, number: int) -> tuple[int, bool]:
        """Get a piece; as `put`. Raises as the store does, and OSError."""
        start = number * PIECE
        return self.put(number, self._store.read(self._entry, start, start + PIECE).data or b"")

    def put(self, number: int, data: bytes) -> tuple[int, bool]:
        """Keep a piece; its bytes, and whether it is the last to come."""
        with self.scratch.open("r+b") as file:
            file.seek(number * PIECE)
            file.write(data)
        with self._lock:
            with self._notes.open("a") as notes:
                notes.write(f"{number} {zlib.crc32(data)}\n")
            self._missing.discard(number)
            return len(data), not self._missing

    def digest(self, kind: str) -> str:
        """Of the file on the disk, in hexadecimal. kind: hashlib's name."""
        return digest_of(self.scratch, kind)

    def end(self) -> None:
        """The scratch has taken the file's place: forget what it was made of."""
        self._notes.unlink()

    def forget(self) -> None:
        """Begin anew."""
        self._notes.write_text(self._title)
        with self.scratch.open("wb") as file:
            file.truncate(self.size)
        self._missing = set(range(-(-self.size // PIECE)))

    def _take_up(self) -> None:
        """What a process before this one has left of the same file."""
        try:
            title, *lines = self._notes.read_text().splitlines(keepends=True)
            same = title == self._title and os.path.getsize(self.scratch) == self.size
        except (OSError, ValueError):
            same = False
        if not same:
            return self.forget()
        numbers = {str(at): at for at in self._missing}
        with self.scratch.open("rb") as file:
            for line in lines:
                number, _, crc = line.partition(" ")
                if line.endswith("\n") and number in numbers:
                    file.seek(numbers[number] * PIECE)
                    if str(zlib.crc32(file.read(PIECE))) == crc.strip():
                        self._missing.discard(numbers[number])
