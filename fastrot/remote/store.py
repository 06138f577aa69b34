"""What every store gives, and how often it is asked."""

import errno
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar

from fastrot.errors import Fault, UserError

T = TypeVar("T")
Checksum = tuple[str, str]  # of hashlib's algorithms one, and its digest in hexadecimal
SUMS = "SHA256SUMS"
_SUM = re.compile(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)")
PARALLEL = 32  # requests at once: an answer across a network takes tens of milliseconds
PAUSES_S = (0.2, 1.0, 5.0, 15.0)  # before the second try and the next
# backends' own errors that no second try mends, by name: their packages may not be here
_REFUSED = frozenset((
    "DefaultCredentialsError", "NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "RefreshError",
))  # fmt: skip
_DISK = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EROFS))


@dataclass(frozen=True)
class Entry:
    """A file: its name below the store's root, its bytes (None: not said), its checksum where one is known, a word that
    changes when its bytes do ("": none), and when it was written, in seconds since 1970 (None: not said)."""

    name: str
    size: int | None = None
    checksum: Checksum | None = None
    version: str = ""
    time: float | None = None


class Piece(NamedTuple):
    """Bytes of a file, and what came with them. data: None where a server gives whole files alone and this one is
    larger than what was asked for; size: of the whole file, -1 where that is not said."""

    data: bytes | None
    size: int
    checksum: Checksum | None = None
    version: str = ""
    time: float | None = None


class Store(ABC):
    """The files below a root. All methods may be called from several threads, ask again where asking may help, and
    raise UserError (not there, refused, a server that lies) or Fault (no answer)."""

    root: str  # its address, for a person

    @abstractmethod
    def is_file(self) -> bool:
        """Whether the root itself is a file. Raises UserError where it is nothing."""

    @abstractmethod
    def find(self) -> list[Entry]:
        """All files below the root."""

    @abstractmethod
    def info(self, name: str) -> Entry:
        """One file."""

    @abstractmethod
    def read(self, entry: Entry, start: int, end: int) -> Piece:
        """Bytes start to end, or to the file's."""

    def vouches(self, entry: Entry) -> bool:
        """Whether an entry's checksum is one of its bytes: asked where the bytes that came have another."""
        return True

    def copy(self, entry: Entry, to: Path) -> Piece:
        """A whole file in one go, for servers without ranges."""
        raise NotImplementedError

    def put(self, data: bytes, name: str) -> None:
        """Write a file. Raises UserError where nothing can be written at such an address."""
        raise UserError(f"{self.root}: cannot be written; name s3://, gs:// or a folder of a shared disk")

    def remove(self, name: str) -> None:
        """Remove a file."""
        raise NotImplementedError

    def whole(self, name: str, most: int = 1 << 30) -> bytes:
        """All of a small file."""
        piece = self.read(Entry(name), 0, most)
        if piece.data is None or piece.size > most:
            raise UserError(f"{self.at(name)}: is larger than {most:,} bytes")
        return piece.data

    @cached_property
    def sums(self) -> dict[str, str]:
        """{name: sha256} as the root's SHA256SUMS says, which sha256sum wrote; empty where none can be read."""
        sums: dict[str, str] = {}
        try:
            text = self.whole(SUMS).decode(errors="surrogateescape")
        except UserError:
            return sums
        for number, line in enumerate(text.splitlines(), 1):
            match = _SUM.fullmatch(line)
            if not match:
                raise UserError(f"{self.at(SUMS)}: line {number}: expected a sha256, two spaces and a name")
            sums[match[2]] = match[1].lower()
        return sums

    def at(self, name: str) -> str:
        """A file's address, for a person."""
        return f"{self.root}/{name}" if name else self.root


def shown(address: str) -> str:
    """An address without what is secret in it: a password, a signature."""
    plain = re.sub(r"(?<=://)[^/@]*@", "", address)
    return re.sub(r"(https?://[^?]*)\?.*", r"\1", plain)


def persist(what: str, work: Callable[[], T]) -> T:
    """What `work` returns, tried again with growing pauses where the other side fails.

    what  the address, for a person. Raises UserError where no second try would help, and Fault after the last.
    """
    for pause in (*PAUSES_S, None):
        try:
            return work()
        except (UserError, Fault):
            raise
        except Exception as error:  # each backend has its own
            _raise_lasting(what, error)
            if pause is None:
                raise Fault(
                    f"{what}: failed {len(PAUSES_S) + 1} times ({reason(error)}); start again: what is whole is kept"
                ) from None
            time.sleep(pause)
    raise AssertionError


def _raise_lasting(what: str, error: Exception) -> None:
    """Raise what asking again would not mend: a name, a right, our own disk."""
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        raise UserError(f"{what}: no such file or folder") from None
    if isinstance(error, PermissionError) or type(error).__name__ in _REFUSED:
        raise UserError(f"{what}: refused ({reason(error)}); check the credentials and their rights") from None
    if isinstance(error, OSError) and error.errno in _DISK:
        raise error


def reason(error: BaseException) -> str:
    """In a few words on one line."""
    inner = getattr(error, "reason", None)  # urllib3's, of what it gave up on
    error = inner if isinstance(inner, BaseException) else error
    text = (getattr(error, "strerror", None) or str(error) or "").strip().splitlines()
    return text[0] if text and text[0] else type(error).__name__
