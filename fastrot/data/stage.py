"""A source at a distance, copied to this machine's disk: in parallel, going on where it was cut, verified, one copy.

DEST/.stage/record.json, written last, says what is whole: [name, bytes, version, what verified it] of each file. Until
then a file that is there under its name is whole too (it came there by a rename); the rest lies in `.tmp-*` (a file of
one piece) and `.part-*` (a larger one, with `.part-*.done`: pieces that are there, with their CRC).
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from fastrot import terminal
from fastrot.data.pieces import PIECE, Pieces
from fastrot.data.sources import in_place
from fastrot.errors import UserError
from fastrot.files import digest_of, read_json, remove, write_text
from fastrot.remote import Entry, Found, Piece, is_remote, locate, shown
from fastrot.remote.store import PARALLEL, Checksum

HOME = ".stage"  # the folder of the record and the lock
_RECORD = "record.json"
_OURS = re.compile(r"\.stage/|(.*/)?\.(tmp|part)-")  # in a source that was staged itself
_TRIES = 3  # of bytes that do not match their checksum


@dataclass(frozen=True)
class _Record:
    """What lies whole in a folder. files: [name, bytes, version at its store, sha256, md5 or size]; prefix, rest: as in
    Found."""

    source: str
    prefix: str
    rest: str
    files: list[tuple[str, int, str, str]]

    def name_in(self, dest: Path) -> str:
        return f"{self.prefix}{dest}{self.rest}"


Track = Callable[..., Iterable[Any]]


def stage(source: str, dest: Path, track: Track = terminal.track) -> dict[str, Any]:
    """Copy what lies at `source` into `dest`, or what of it is not there yet, and say what was done.

    Of several processes one copies, the others wait and find it there. Raises UserError where the source is missing or
    refused, where `dest` cannot be written, is too small or holds other files, and where a checksum does not hold; Fault
    where a store does not answer.
    """
    began = time.monotonic()
    with _alone(dest):
        found = locate(source)
        work = _Staging(found, dest, _read_record(dest))
        try:
            work.run(track, f"staging {shown(source)}")
            os.sync()
            record = _Record(shown(source), found.prefix, found.rest, sorted(work.whole))
            write_text(dest / HOME / _RECORD, json.dumps(vars(record)))
        except OSError as error:
            raise UserError(
                f"{dest}: cannot be written ({error.strerror or error}); make room and start again: what is whole is kept"
            ) from None
    seconds = time.monotonic() - began
    return {
        "source": record.source,
        "dest": str(dest),
        "data": record.name_in(dest),
        "files": len(record.files),
        "bytes": sum(size for _, size, _, _ in record.files),
        "fetched_bytes": work.fetched,
        "seconds": seconds,
        "mb_per_s": work.fetched / 1e6 / seconds,
        "verified_by": dict(Counter(how for *_, how in record.files)),
    }


def staged(source: str, folder: Path, track: Track = terminal.track) -> str:
    """Where a source lies below `folder`, as a source: staged now, or before, which is believed without asking its store
    where all files have their sizes. Raises as `stage`."""
    plain = shown(source)
    last = re.sub(r"[^A-Za-z0-9.-]+", "-", plain.rpartition("/")[2]).strip("-.")
    dest = folder / f"{last or 'data'}-{hashlib.sha256(plain.encode()).hexdigest()[:12]}"
    record = _read_record(dest)
    if record and _present(dest) == {name: size for name, size, _, _ in record.files}:
        return record.name_in(dest)
    return str(stage(source, dest, track)["data"])


def of_config(source: str | None, folder: str | None, key: str) -> str | None:
    """`staged` as a config says it; a source on this machine, or one that is read where it is, as it is. key: of the config, that names the source."""
    if not is_remote(source):
        return source
    plain = shown(str(source))
    if folder is None and in_place(str(source)):
        return source
    if folder is None:
        raise UserError(
            f"{key}: {plain} is not on this machine; set data.stage to a folder on its disk, or fastrot stage {plain} DIR"
        )
    return staged(str(source), Path(folder))


@contextmanager
def _alone(dest: Path) -> Iterator[None]:
    """Hold the folder against other processes; wait, and say so, while one holds it."""
    try:
        (dest / HOME).mkdir(parents=True, exist_ok=True)
        lock = (dest / HOME / "lock").open("w")
    except OSError as error:
        raise UserError(f"{dest}: cannot be written ({error.strerror}); name a folder on this machine's disk") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            terminal.console().print(
                f"{dest}: another process stages there; waiting for it", soft_wrap=True, markup=False
            )
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read_record(dest: Path) -> _Record | None:
    try:
        return read_json(dest / HOME / _RECORD, _Record)
    except (OSError, ValueError):
        return None  # none yet, or damaged: files are looked at anew


def _present(dest: Path) -> dict[str, int]:
    """{name: bytes} of the files there, without ours."""
    found, top = {}, str(dest)
    for folder, inner, names in os.walk(top):
        if folder == top:
            inner[:] = [name for name in inner if name != HOME]
        for name in names:
            path = os.path.join(folder, name)
            found[path[len(top) + 1 :]] = os.lstat(path).st_size
    return found


@dataclass
class _Done:
    """What a job has done: pieces and bytes that came; and what is to do now."""

    pieces: int = 0
    bytes: int = 0
    more: list["_Job"] = field(default_factory=list)


_Job = Callable[[], _Done]


class _Staging:
    """One source on its way into one folder."""

    def __init__(self, found: Found, dest: Path, before: _Record | None):
        self._store, self._dest = found.store, dest
        self._files = {name: entry for name, entry in found.files.items() if not _OURS.match(name)}
        self._before = {row[0]: row for row in before.files} if before else {}
        self.whole: list[tuple[str, int, str, str]] = []
        self.fetched = 0

    def run(self, track: Track, title: str) -> None:
        """Fetch what is not there. Raises UserError, Fault, OSError."""
        present = self._own(_present(self._dest))
        jobs: deque[_Job] = deque()
        total = need = 0
        for name, entry in self._files.items():
            if self._as_recorded(entry, present.get(name)):
                self.whole.append(self._before[name])
                continue
            jobs.append(partial(self._file, entry, present.get(name)))
            total += max(1, -(-(entry.size or 0) // PIECE))
            need += 0 if name in present else entry.size or 0
        need -= sum(os.stat(path).st_blocks * 512 for path in self._dest.rglob(".part-*") if path.suffix != ".done")
        free = shutil.disk_usage(self._dest).free
        if need > free:
            raise UserError(f"{self._dest}: {need / 1e9:.3f} GB are to come, {free / 1e9:.3f} GB are free; make room")
        began = time.monotonic()

        def note() -> str:
            return f"{self.fetched / 1e9:.2f} GB, {self.fetched / 1e6 / (time.monotonic() - began):.0f} MB/s"

        for _ in track(self._pieces(jobs), total, title, note):
            pass

    def _own(self, present: dict[str, int]) -> dict[str, int]:
        """Of what lies there the files of the source; what was its and is no more, and scratch, goes."""
        for name in present.keys() - self._files.keys():
            last = name.rpartition("/")[2]
            part = last.startswith(".part-") and name.replace(".part-", "", 1).removesuffix(".done") in self._files
            if name in self._before or last.startswith(".tmp-"):
                remove(self._dest / name)
            elif not part:
                raise UserError(f"{self._dest}: holds {name}, which is not the source's; name a folder of its own")
        return {name: size for name, size in present.items() if name in self._files}

    def _as_recorded(self, entry: Entry, there: int | None) -> bool:
        _, size, version, _ = self._before.get(entry.name, ("", -1, "", ""))
        return there == size == entry.size and entry.version == version

    def _pieces(self, jobs: deque[_Job]) -> Iterator[int]:
        """Do all jobs, and those that come of them; gives once for each piece."""
        ended: SimpleQueue[Future[_Done]] = SimpleQueue()
        flying = 0
        pool = ThreadPoolExecutor(PARALLEL, thread_name_prefix="stage")
        try:
            while jobs or flying:
                while jobs and flying < 2 * PARALLEL:
                    pool.submit(jobs.popleft()).add_done_callback(ended.put)
                    flying += 1
                done = ended.get().result()
                flying -= 1
                jobs.extendleft(reversed(done.more))  # what is begun is ended first
                self.fetched += done.bytes
                yield from range(done.pieces)
        finally:
            pool.shutdown(cancel_futures=True)

    def _file(self, entry: Entry, there: int | None) -> _Done:
        """A file that may be there already. there: its bytes, or None."""
        if there is not None and entry.size is None:
            entry = self._asked(entry)
        if there is not None and entry.name not in self._before and there == entry.size:
            if how := self._verified(entry, entry.checksum, partial(digest_of, self._dest / entry.name)):
                self.whole.append((entry.name, there, entry.version, how))
                return _Done(max(1, -(-there // PIECE)))
            (self._dest / entry.name).unlink()
        elif self._as_recorded(entry, there):
            self.whole.append(self._before[entry.name])
            return _Done(1)
        path = self._dest / entry.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if (entry.size or 0) > PIECE and Pieces.begun(path):
            return self._large(entry)
        for _ in range(_TRIES):
            piece = self._store.read(entry, 0, PIECE)
            if piece.data is None:
                return self._in_one_go(entry)
            if piece.size > PIECE:
                return self._large(entry if entry.size is not None else self._asked(entry), piece.data)
            digest = partial(_digest, piece.data)
            if how := self._verified(entry, entry.checksum or piece.checksum, digest):
                scratch = path.with_name(f".tmp-{path.name}")
                scratch.write_bytes(piece.data)
                self._keep(entry, piece, how, scratch)
                return _Done(1, len(piece.data))
        raise self._wrong(entry)

    def _large(self, entry: Entry, first: bytes = b"") -> _Done:
        """A file of several pieces, each a job, and a last one that looks at the whole. first: the first, where it came."""
        file = Pieces(self._store, entry, self._dest / entry.name)
        if first:
            file.put(0, first)
        tries = 0

        def fetched(number: int) -> _Done:
            size, last = file.fetch(number)
            return _Done(1, size, [whole] if last else [])

        def whole() -> _Done:
            nonlocal tries
            if how := self._verified(entry, entry.checksum, file.digest):
                self._keep(entry, Piece(None, file.size), how, file.scratch)
                file.end()
                return _Done()
            file.forget()
            if (tries := tries + 1) == _TRIES:
                raise self._wrong(entry)
            return _Done(more=jobs())

        def jobs() -> list[_Job]:
            return [partial(fetched, number) for number in file.missing()] or [whole]

        return _Done(file.there or 1, len(first), jobs())

    def _in_one_go(self, entry: Entry) -> _Done:
        """A large file of a server without ranges."""
        scratch = (self._dest / entry.name).with_name(f".tmp-{entry.name.rpartition('/')[2]}")
        for _ in range(_TRIES):
            piece = self._store.copy(entry, scratch)
            if how := self._verified(entry, entry.checksum or piece.checksum, partial(digest_of, scratch)):
                self._keep(entry, piece, how, scratch)
                return _Done(1, piece.size)
        raise self._wrong(entry)

    def _asked(self, entry: Entry) -> Entry:
        """With its size and version."""
        told = self._store.info(entry.name)
        return replace(told, checksum=entry.checksum or told.checksum)

    def _verified(self, entry: Entry, checksum: Checksum | None, digest: Callable[[str], str]) -> str:
        """What says that the bytes are the file's: sha256, md5, or their number alone; "" where they are not.

        digest  of an algorithm by name, in hexadecimal.
        """
        if checksum is None:
            return "size"
        if digest(checksum[0]) == checksum[1]:
            return checksum[0]
        return "" if self._store.vouches(entry) else "size"

    def _keep(self, entry: Entry, piece: Piece, how: str, scratch: Path) -> None:
        """A file that is whole takes its name, with the source's time: copies of one source look alike to a resume."""
        if when := entry.time or piece.time:
            os.utime(scratch, (when, when))
        scratch.replace(self._dest / entry.name)
        self.whole.append((entry.name, piece.size, entry.version or piece.version, how))

    def _wrong(self, entry: Entry) -> UserError:
        return UserError(
            f"{self._store.at(entry.name)}: its bytes came {_TRIES} times and did not match its checksum; mend it at the source"
        )


def _digest(data: bytes, kind: str) -> str:
    return hashlib.new(kind, data).hexdigest()
