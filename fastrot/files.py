"""Files that appear whole or not at all, and our JSON, read by a schema."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")
_SCRATCH = (".tmp-*", ".*.tmp")  # the second as earlier versions named theirs


class Damaged(ValueError):
    """A file of ours that does not say what it should, in a few words."""


def fsync(path: Path) -> None:
    """A file, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path, folder: bool = False) -> Iterator[Path]:
    """Give a scratch beside `path` to write; it takes `path`'s place, on the disk, once the block has ended well.

    folder  make the scratch a folder, for files alone; else it is a file that is there and empty.
    The umask decides the modes, not who writes. A block that raises leaves `path` as it was, and no scratch.
    """
    scratch = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        remove(scratch)
        if folder:
            scratch.mkdir()
        else:
            scratch.touch()
        mode = scratch.stat().st_mode & 0o666
        yield scratch
        for file in scratch.iterdir() if folder else (scratch,):
            file.chmod(mode)
            fsync(file)
        if folder:
            fsync(scratch)
            remove(path)
        scratch.replace(path)
        fsync(path.parent)
    finally:
        remove(scratch)


def remove(path: Path) -> None:
    """A file or a folder with all that is in it, where there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def clear_scratch(folder: Path) -> None:
    """What a killed process was writing in `folder`. For who alone writes there."""
    for pattern in _SCRATCH:
        for left in folder.glob(pattern):
            remove(left)


def write_text(path: Path, text: str) -> None:
    """Replace a small file at once: a reader sees the old text or the new, never half."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def as_words(path: str | bytes) -> str:
    """A path as text that can be printed, whatever its bytes."""
    return os.fsdecode(path).encode("utf-8", "backslashreplace").decode()


def digest_of(path: Path, kind: str) -> str:
    """A file's, in hexadecimal. kind: hashlib's name."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def sha256_of(path: Path) -> str:
    return digest_of(path, "sha256")


@dataclass(frozen=True)
class Sealed:
    """What a manifest of ours says of a file, so that damage to it is seen."""

    sha256: str
    bytes: int

    @classmethod
    def of(cls, path: Path) -> "Sealed":
        return cls(sha256_of(path), path.stat().st_size)


def read_json(path: Path, schema: type[T]) -> T:
    """A JSON file as `schema`, a dataclass or a type of plain values; other keys are passed over.

    Raises OSError where it cannot be read, Damaged where it says something else.
    """
    return as_json(path.read_bytes(), schema)


def as_json(text: bytes, schema: type[T]) -> T:
    """JSON text as `schema`. Raises Damaged."""
    try:
        adapter: TypeAdapter[T] = _adapter(schema)  # type: ignore[arg-type]  # a type is hashable
        return adapter.validate_python(json.loads(text))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise Damaged(f"{where or 'all of it'}: {first['msg']}") from None
    except RecursionError:
        raise Damaged("nested too deep") from None
    except ValueError as error:
        raise Damaged(f"not JSON: {error}") from None


@cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


def finite(value: Any) -> Any:
    """For JSON, which has no other numbers: what is not finite is null, however deep it lies."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
