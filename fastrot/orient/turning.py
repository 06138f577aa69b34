"""Answers carried out: upright copies, or the files themselves, by their tag or by their pixels, all of which can be undone."""

import os
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fastrot.data.images import kind_of
from fastrot.data.scan import Track
from fastrot.errors import UserError
from fastrot.files import as_words, sha256_of
from fastrot.orient import coefficients, exif, recoded
from fastrot.orient.answers import Answer
from fastrot.orient.exif import Refused, composed, orientation_in
from fastrot.orient.journal import Journal, digest, opened

_COPY = "copy:"
_State = tuple[int, int, int]  # inode, bytes, modification time in ns


@dataclass
class Applied:
    """What became of the files.

    counts  turned (pixels), tagged, copied as they were, untouched, done (by the journal, before), left.
    left    file -> why it could not be put upright.
    """

    journal: str
    originals_bytes: int = 0  # that the journal's originals hold
    counts: Counter[str] = field(default_factory=Counter)
    left: dict[str, str] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        kinds = ("turned", "tagged", "copied", "untouched", "done", "left")
        return vars(self) | {"counts": {kind: self.counts[kind] for kind in kinds}}


@dataclass(frozen=True)
class _File:
    """One answer's file. name: relative to the folder; state: when it was checked."""

    path: Path
    name: str
    answer: Answer
    state: _State


def apply(
    answers: Iterable[Answer],
    folder: Path,
    how: str,
    in_place: bool = False,
    trim: bool = False,
    journal: Path | None = None,
    looked_at: int | None = None,
    track: Track = lambda items, total, title: items,
) -> Applied:
    """Put decided images of `folder` upright; a kill loses nothing: the same call goes on.

    how       `exif`: by the tag alone; `lossless`: by pixels, without loss, the tag then 1; both need `in_place`. `copy:DIR`: as
              lossless, or by the tag where that cannot be, into DIR; all other files that were answered are copied as they are.
    trim      cut JPEGs whose sides are no whole blocks, at the edges that need it.
    journal   default: beside what is changed, FOLDER.orient-journal.jsonl.
    looked_at when the answers began to be made, in ns of the clock: what has changed since is refused.
    Raises UserError, before anything is changed where it can be known by then.
    """
    target, journal = places(folder, how, in_place, journal)
    files = _checked(answers, Path(os.path.abspath(folder)), folder.resolve(), looked_at)
    done = Applied(str(journal))
    try:
        with opened(journal, target) as book:
            for file in track(files, len(files), "putting images upright"):
                if how.startswith(_COPY):
                    kind, why = _copy(file, book, trim)
                else:
                    kind, why = _replace(file, book, how, trim, done)
                done.counts[kind] += 1
                if why:
                    done.left[file.name] = why
    except OSError as error:
        where = as_words(str(error.filename or journal))
        raise UserError(
            f"{where}: {error.strerror}; what is done stands in {journal}: the same command goes on, --undo takes it back"
        ) from None
    return done


def places(folder: Path, how: str, in_place: bool, journal: Path | None) -> tuple[Path, Path]:
    """The folder that is written to, and the journal. Raises UserError where the words do not go together."""
    target = _target(folder.resolve(), how, in_place)
    journal = (journal or target.with_name(target.name + ".orient-journal.jsonl")).resolve()
    if journal.is_relative_to(folder.resolve()):
        raise UserError(f"{journal}: the journal cannot lie in the folder that is turned; name another by --journal")
    return target, journal


def _target(folder: Path, how: str, in_place: bool) -> Path:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; --apply puts the images of a folder upright")
    if how in ("exif", "lossless"):
        if not in_place:
            raise UserError(f"--apply {how} changes the files themselves: add --in-place, or name --apply copy:DIR")
        return folder
    if not how.startswith(_COPY) or how == _COPY:
        raise UserError(f"--apply {how}: expected copy:DIR, exif or lossless")
    if in_place:
        raise UserError(f"--apply {how} leaves the files themselves alone: leave --in-place out")
    target = Path(how.removeprefix(_COPY)).resolve()
    if target.is_relative_to(folder) or folder.is_relative_to(target):
        raise UserError(f"--apply {how}: must lie outside {folder}, and not around it")
    return target


def _checked(answers: Iterable[Answer], named: Path, folder: Path, looked_at: int | None) -> list[_File]:
    """The files of the answers, each there. named: the folder as the answers name it. Raises UserError."""
    files: dict[str, _File] = {}
    for answer in answers:
        name = os.path.relpath(named / answer.file, named)
        if Path(name).parts[0] == os.pardir:
            raise UserError(f"{as_words(answer.file)}: lies outside {named}, the folder that is put upright")
        path = folder / name
        if name in files:
            raise UserError(f"{as_words(name)}: has two answers; give each file one")
        try:
            found = path.stat()
        except OSError as error:
            raise UserError(f"{as_words(str(path))}: is gone ({error.strerror}); run fastrot orient again") from None
        if not stat.S_ISREG(found.st_mode):
            raise UserError(
                f"{as_words(str(path))}: is no image file of its own; images inside other files are not turned"
            )
        if looked_at is not None and found.st_ctime_ns > looked_at:
            raise _changed(path)
        files[name] = _File(path, name, answer, _state(found))
    return list(files.values())


def _changed(path: Path) -> UserError:
    return UserError(f"{as_words(str(path))}: has changed since it was looked at; run fastrot orient again")


def _state(found: os.stat_result) -> _State:
    return found.st_ino, found.st_size, found.st_mtime_ns


def _unchanged(file: _File) -> bool:
    return file.path.exists() and _state(file.path.stat()) == file.state


def _read(file: _File) -> bytes:
    data = file.path.read_bytes()
    if not _unchanged(file):
        raise _changed(file.path)
    return data


def _turns(file: _File) -> bool:
    return file.answer.decided and file.answer.clockwise != 0


def _copy(file: _File, journal: Journal, trim: bool) -> tuple[str, str]:
    """What was done to make an upright copy, and why it was not turned."""
    target = journal.folder / file.name
    there = sha256_of(target) if target.is_file() else None
    if journal.done(file.name, there):
        return "done", ""
    if there is not None or target.exists():
        raise UserError(f"{as_words(str(target))}: is there already; choose an empty folder for --apply copy:DIR")
    data = _read(file)
    kind, why, new = "copied", "", data
    if _turns(file):
        kind, why, new = _best(file, data, trim)
    journal.replace(file.name, new, file.path, None, partial(_unchanged, file))
    return kind, why


def _best(file: _File, data: bytes, trim: bool) -> tuple[str, str, bytes]:
    """Pixels turned, else tagged, else as it is; and why not by pixels."""
    try:
        return "turned", "", _upright(file, data, "lossless", trim)
    except Refused as refused:
        why = str(refused)
    try:
        return "tagged", why, _upright(file, data, "exif", trim)
    except Refused as refused:
        return "left", f"{why}; {refused}", data


def _replace(file: _File, journal: Journal, how: str, trim: bool, done: Applied) -> tuple[str, str]:
    """What was done to a file itself, and why it was left."""
    if not _turns(file):
        return "untouched", ""
    if file.path.resolve() != file.path:
        return "left", "is a link, or lies behind one; name the folder that it leads to"
    data = _read(file)
    if journal.done(file.name, digest(data)):
        return "done", ""
    try:
        new = _upright(file, data, how, trim)
    except Refused as refused:
        return "left", str(refused)
    journal.replace(file.name, new, file.path, data, partial(_unchanged, file))
    done.originals_bytes += len(data)
    return "turned" if how == "lossless" else "tagged", ""


def _upright(file: _File, data: bytes, how: str, trim: bool) -> bytes:
    """Its bytes, put upright. Raises Refused; UserError where its tag is not what it was when it was looked at."""
    kind = kind_of(data)
    now = orientation_in(data, kind)
    if file.answer.exif not in (None, now):
        raise UserError(
            f"{as_words(str(file.path))}: its EXIF tag has changed since it was looked at; run fastrot orient again"
        )
    wanted = composed(now, file.answer.clockwise)
    if how == "exif" or wanted == 1:  # pixels that lie well under a wrong tag
        return exif.tagged(data, kind, wanted)
    if kind == "JPEG":
        return coefficients.turned(data, wanted, trim)
    return recoded.turned(data, kind, wanted)
