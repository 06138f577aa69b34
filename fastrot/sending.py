"""A folder of rank 0's, read by every rank: where it lies, or in a copy that rank 0 sends to each node once."""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from fastrot import machine
from fastrot.distributed import Ranks, agree, of_all, on_first
from fastrot.files import remove

_PIECE = 16 << 20  # bytes


class _File(NamedTuple):
    name: str
    bytes: int
    time_ns: int


@contextmanager
def read_by_all(ranks: Ranks, find: Callable[[], Path]) -> Iterator[Path]:
    """Within, the folder that `find` names on rank 0, as this rank can read it; it holds files alone. A node that does
    not see the very same files gets a copy in its cache, which goes once all ranks have left.

    Collective. Raises what `find` raises; UserError where a node cannot keep a copy.
    """

    def found() -> tuple[Path, list[_File], str]:
        folder = find()
        return folder, _files(folder), secrets.token_hex(8)

    folder, files, name = on_first(ranks, found)
    copy = machine.cache_folder() / "sent" / name
    mine = "" if ranks.first or _files(folder) == files else f"{machine.booted()} {_mounts()} {copy}"
    needs = of_all(ranks, mine)
    if not any(needs):
        yield folder
        return
    keeps = bool(mine) and needs.index(mine) == ranks.rank
    try:
        agree(ranks, _send(ranks, folder, files, copy if keeps else None))
        yield copy if mine else folder
        dist.barrier()
    finally:
        if keeps and copy.exists():
            remove(copy)


def _files(folder: Path) -> list[_File]:
    """Empty where it is not seen from here."""
    try:
        with os.scandir(folder) as entries:
            stats = [(entry.name, entry.stat()) for entry in entries]
    except OSError:
        return []
    return sorted(_File(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def _mounts() -> int:
    """Processes of a machine with the same number see the same files under a name."""
    return os.stat("/proc/self/ns/mnt").st_ino


def _send(ranks: Ranks, folder: Path, files: list[_File], copy: Path | None) -> str:
    """Every rank takes part, those with a `copy` write it; why one cannot, or nothing."""
    wrong = ""
    for file in files:
        for at in range(0, max(1, file.bytes), _PIECE):
            piece = on_first(ranks, partial(_read, folder / file.name, at))
            if copy and not wrong:
                wrong = _append(copy / file.name, piece)
    return wrong


def _read(path: Path, at: int) -> bytes:
    with path.open("rb") as file:
        file.seek(at)
        return file.read(_PIECE)


def _append(path: Path, piece: bytes) -> str:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(piece)
    except OSError as error:
        return f"{path}: cannot be written ({error.strerror}); set FASTROT_CACHE to a folder that can"
    return ""
