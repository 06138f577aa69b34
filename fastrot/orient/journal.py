"""Files replaced so that each can be had back: what was done stands in a journal before it is done.

The journal is a header's line and a line of JSON a file; beside it lies a folder of the originals. An original is a second
name (hard link) of the file that is replaced, or a copy where the disk has none: either way the disk holds both versions
until the journal is undone or removed.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fastrot.errors import UserError
from fastrot.files import as_words, fsync, remove, sha256_of

_HEADER = {"journal": "fastrot orient", "version": 1}
_START = json.dumps(_HEADER).removesuffix("}").encode()  # of a header's line


@dataclass(frozen=True)
class Entry:
    """file: relative to the journal's folder; before, after: sha256 of its bytes, before None where it is new."""

    file: str
    before: str | None
    after: str


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Journal:
    """Replaces files of one folder. entries: the last of each file."""

    def __init__(self, path: Path, folder: Path, entries: dict[str, Entry], file: BinaryIO):
        self.path, self.folder, self.entries, self._file = path, folder, entries, file

    def done(self, file: str, sha256: str | None) -> bool:
        """Whether a file, whose bytes now have this digest, has been replaced already.

        Raises UserError where the journal knows it, but as something else.
        """
        entry = self.entries.get(file)
        if entry is None or sha256 == entry.before:
            return False
        if sha256 != entry.after:
            raise UserError(
                f"{self.folder / file}: has changed since it was turned; undo or remove {self.path}, or name another by --journal"
            )
        return True

    def replace(
        self, file: str, data: bytes, source: Path, before: bytes | None, unchanged: Callable[[], bool]
    ) -> None:
        """Give a file new bytes, with the mode, times and attributes of `source`. A kill leaves the old file or the new.

        before     its bytes now; None where it is new.
        unchanged  asked at the last instant. Raises UserError where it says no; OSError.
        """
        target, scratch = self.folder / file, self._scratch(file)
        entry = Entry(file, None if before is None else digest(before), digest(data))
        _make(target.parent)
        if before is not None:
            self._keep(file)
        self._still(source, unchanged)
        self._note(entry)
        try:
            scratch.write_bytes(data)
            if before is not None:
                _keep_owner(source, scratch)
            shutil.copystat(source, scratch)
            fsync(scratch)
            self._still(source, unchanged)
            scratch.replace(target)
            fsync(target.parent)
        finally:
            remove(scratch)

    def _still(self, source: Path, unchanged: Callable[[], bool]) -> None:
        if not unchanged():
            raise UserError(f"{as_words(str(source))}: changed while it was being turned; run fastrot orient again")

    def _note(self, entry: Entry) -> None:
        self._file.write(json.dumps(asdict(entry)).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.entries[entry.file] = entry

    def _scratch(self, file: str) -> Path:
        """One name for each file, so that the next try clears what a killed one left."""
        return (self.folder / file).with_name(f".tmp-orient-{digest(os.fsencode(file))[:16]}")

    @property
    def originals(self) -> Path:
        return self.path.with_name(self.path.name + ".originals")

    def _keep(self, file: str) -> None:
        kept = self.originals / file
        _make(kept.parent)
        remove(kept)
        _second_name(self.folder / file, kept)

    def give_back(self, entry: Entry) -> bool:
        """Make a file what it was; False where it is neither what it was nor what it became. Raises UserError, OSError."""
        target, scratch = self.folder / entry.file, self._scratch(entry.file)
        remove(scratch)
        now = sha256_of(target) if target.is_file() else None
        if now == entry.before:
            return True
        if now != entry.after:
            return False
        if entry.before is None:
            target.unlink()
        else:
            kept = self.originals / entry.file
            if not kept.is_file() or sha256_of(kept) != entry.before:
                raise UserError(f"{kept}: is gone or damaged, so {target} stays as it was turned")
            _second_name(kept, scratch)
            scratch.replace(target)
        fsync(target.parent)
        return True

    def forget(self) -> None:
        """Remove originals, then the journal; and the folders that new files left empty."""
        remove(self.originals)
        made = {
            parent for entry in self.entries.values() if entry.before is None for parent in Path(entry.file).parents
        }
        for parent in sorted(made, key=lambda parent: -len(parent.parts)):
            _remove_empty(self.folder / parent)
        self.path.unlink()
        fsync(self.path.parent)


@contextmanager
def opened(path: Path, folder: Path | None) -> Iterator[Journal]:
    """A journal of `folder`, begun where there is none, for this process alone; None: one that is there, of any folder.

    Raises UserError where it is something else's, damaged, or in use; OSError.
    """
    if folder is not None:
        _make(path.parent)
    with os.fdopen(os.open(path, os.O_RDWR | (os.O_CREAT if folder else 0), 0o666), "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path}: in use by another fastrot orient; wait until it has ended") from None
        of, entries = _read(path, file)
        if of is None and folder is not None:
            file.truncate(file.seek(0))
            file.write(json.dumps(_HEADER | {"folder": str(folder)}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            fsync(path.parent)
        elif folder not in (None, of):
            raise UserError(f"{path}: is the journal of {of}, not of {folder}; name another by --journal")
        yield Journal(path, folder or of or path.parent, entries, file)


def _read(path: Path, file: BinaryIO) -> tuple[Path | None, dict[str, Entry]]:
    """Folder and entries; the file stands at its end, less a line that a kill cut short. No folder where that is the first."""
    data = file.read()
    if b"\n" not in data and (_START.startswith(data) or data.startswith(_START)):
        return None, {}
    lines = data.splitlines(keepends=True)
    try:
        header = json.loads(lines[0])
        if {key: header[key] for key in _HEADER} != _HEADER:
            raise ValueError
        folder = Path(header["folder"])
        if not folder.is_absolute():
            raise ValueError
    except (ValueError, TypeError, LookupError):
        raise UserError(f"{path}: is no journal of fastrot orient") from None
    whole = [line for line in lines if line.endswith(b"\n")]
    try:
        entries = [_entry(json.loads(line)) for line in whole[1:]]
    except (ValueError, TypeError):
        raise UserError(f"{path}: is damaged; the originals lie in {path.name}.originals beside it") from None
    if len(whole) < len(lines):
        file.truncate(file.seek(sum(map(len, whole))))
    return folder, {entry.file: entry for entry in entries}


def _entry(values: dict[str, Any]) -> Entry:
    entry = Entry(**values)
    if not isinstance(entry.file, str) or Path(entry.file).is_absolute() or ".." in Path(entry.file).parts:
        raise ValueError
    return entry


def undo(path: Path) -> dict[str, Any]:
    """Give every file back its bytes, mode and times, remove files that were new, then the journal and its originals.

    A kill loses nothing: the same call goes on. Returns counts. Raises UserError; where files have changed since, after all
    others, and the journal stays.
    """
    try:
        with opened(path, None) as journal:
            entries = list(journal.entries.values())
            changed = [entry for entry in entries if not journal.give_back(entry)]
            if changed:
                raise UserError(
                    f"{path}: {len(changed):,} of {len(entries):,} files have changed since, as {as_words(changed[0].file)}, and are "
                    f"left alone; the others are as they were; originals lie in {journal.originals}"
                )
            journal.forget()
    except FileNotFoundError:
        raise UserError(f"{path}: no such journal; fastrot orient --apply names it") from None
    except OSError as error:
        raise UserError(
            f"{path}: stopped at {as_words(str(error.filename or path))} ({error.strerror}); the same command goes on when that is mended"
        ) from None
    removed = sum(entry.before is None for entry in entries)
    return {"journal": str(path), "given_back": len(entries) - removed, "removed": removed}


def _second_name(file: Path, name: Path) -> None:
    """The same bytes, times and mode under another name; a copy where the disk or our rights allow no link."""
    try:
        os.link(file, name)
    except OSError:
        shutil.copy2(file, name)
        _keep_owner(file, name)
        fsync(name)
    fsync(name.parent)


def _keep_owner(file: Path, copy: Path) -> None:
    of, now = file.stat(), copy.stat()
    if (of.st_uid, of.st_gid) != (now.st_uid, now.st_gid):
        os.chown(copy, of.st_uid, of.st_gid)


def _make(folder: Path) -> None:
    """A folder with its parents, on the disk."""
    if not folder.is_dir():
        _make(folder.parent)
        folder.mkdir(exist_ok=True)
        fsync(folder.parent)


def _remove_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
            raise
