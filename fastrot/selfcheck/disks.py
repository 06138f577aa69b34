"""How fast and how roomy the disks are that a run writes to and reads from."""

import fcntl
import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastrot import machine
from fastrot.config import Config
from fastrot.data.reading import is_far, states
from fastrot.data.sources import parts_of, shards_of
from fastrot.distributed import Ranks
from fastrot.remote import is_remote
from fastrot.remote.file import file_at
from fastrot.remote.file import stretch as stretch_of
from fastrot.selfcheck.doctor import BROKEN, FINE, LOW, SLOW, Check
from fastrot.selfcheck.report import RECORD

GIB, MIB = 2**30, 2**20
_PROBE = 64 * MIB  # written and read
_WRITES = 50 * MIB  # bytes a second, below which a checkpoint of 200 MiB takes many seconds
_ROOM = 5 * GIB
_FILES, _READ = 256, 64 * MIB  # of the data, at most
_IMAGE = 110 * 1024  # bytes, as ImageNet's are
_IMAGES = RECORD / 4  # a second that a GPU takes at the record's pace


def run_folder(config: Config, ranks: Ranks) -> Iterator[Check]:
    yield from _written("run.out", Path(config.run.out), "run.out=", locks=True)


def cache(config: Config, ranks: Ranks) -> Iterator[Check]:
    yield from _written("cache", machine.cache_folder(), "export FASTROT_CACHE=", locks=True)


def _written(what: str, path: Path, elsewhere: str, locks: bool) -> Iterator[Check]:
    """Room and pace of a folder, or of that in which it will lie."""
    home = next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())
    kind = f"{path}, {_filesystem(home)}"
    if not os.access(home, os.W_OK | os.X_OK) or not home.is_dir():
        yield Check(what, BROKEN, f"{kind}: {home} cannot be written", f"{elsewhere}a folder that can")
        return
    place = os.statvfs(home)
    room = place.f_bavail * place.f_frsize
    if room < max(_ROOM, 2 * _PROBE):
        yield Check(
            what,
            BROKEN if room < 2 * _PROBE else LOW,
            f"{kind}: {room / GIB:.1f} GiB free",
            f"{elsewhere}a larger disk",
        )
    if room < 2 * _PROBE:
        return
    writes, reads, locked = _pace(home)
    if locks and not locked:
        yield Check(what, BROKEN, f"{kind}: knows no file locks", f"{elsewhere}a disk that does, or mount it with them")
    says = f"{kind}: {room / GIB:,.0f} GiB free, writes {writes / MIB:,.0f} MiB/s, reads {reads / MIB:,.0f} MiB/s"
    yield Check(what, SLOW, says, f"{elsewhere}a faster disk") if writes < _WRITES else Check(what, FINE, says)


def _pace(folder: Path) -> tuple[float, float, bool]:
    """Bytes a second written to the disk, and read from it again; whether a file can be locked there."""
    block, locked = os.urandom(4 * MIB), True
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            locked = False
        began = time.perf_counter()
        for _ in range(_PROBE // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter() - began
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        began = time.perf_counter()
        while file.read(len(block)):
            pass
        return _PROBE / written, _PROBE / (time.perf_counter() - began), locked


def _filesystem(path: Path) -> str:
    """The kind of file system that a path lies on, as the kernel names it."""
    best, kind = "", "unknown"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        point = left.split()[4].encode().decode("unicode_escape")
        if path.is_relative_to(point) and len(point) >= len(best):
            best, kind = point, right.split()[0]
    return kind


def data(config: Config, ranks: Ranks) -> Iterator[Check]:
    """What data.train and data.val give to data.readers threads, from the disk where the kernel lets go of what it holds."""
    for key in ("train", "val"):
        source = getattr(config.data, key)
        if source is None:
            continue
        if is_remote(source) and config.data.stage:
            yield from _written("data.stage", Path(config.data.stage), "data.stage=", locks=True)
            continue
        stretches = list(_stretches(source))
        if not stretches:
            yield Check(
                f"data.{key}", BROKEN, f"{source}: no file is there to read", f"data.{key}=where the images lie"
            )
            continue
        for path, _, _ in stretches:
            if not is_far(path):
                _forget(path)
        began = time.perf_counter()
        with ThreadPoolExecutor(config.data.readers) as pool:
            sizes = list(pool.map(_read, stretches))
        pace, rate = sum(sizes) / (time.perf_counter() - began), len(sizes) / (time.perf_counter() - began)
        first = stretches[0][0]
        place = "at a distance" if is_far(first) else _filesystem(Path(os.fsdecode(first)).resolve())
        says = f"{source}, {place}: {rate:,.0f} images/s, {pace / MIB:,.0f} MiB/s with {config.data.readers} readers"
        wanted = _IMAGES * ranks.local_world if ranks.device.type == "cuda" else 0
        if rate < wanted:
            cure = "more data.readers, data.order=window, or the data on a disk of this node"
            yield Check(f"data.{key}", SLOW, f"{says}; {ranks.local_world} GPUs take up to {wanted:,.0f}", cure)
        else:
            yield Check(f"data.{key}", FINE, says)


def _stretches(source: str) -> Iterator[tuple[bytes, int, int]]:
    """(file, offset, bytes) of some images of a source, or of stretches as long as an image where it is a few shards.
    Raises UserError where a shard is missing."""
    shards = shards_of(source)
    if shards:
        sizes = zip(shards, states(shards)[:, 0].tolist(), strict=True)
        places = ((path, at) for path, size in sizes for at in range(0, size, 97 * _IMAGE))
        yield from ((path, at, _IMAGE) for path, at in itertools.islice(places, _FILES))
        return
    part = parts_of(source)[0]
    prefix, colon, rest = part.partition(":")
    root = Path((rest if colon and prefix.isalnum() else part).partition("?")[0])
    if prefix == "list":
        with root.open("rb") as lines:
            names = [line.rstrip(b"\n").partition(b"\t")[0] for line in itertools.islice(lines, _FILES)]
        files = (os.path.join(os.fsencode(root.parent.absolute()), name) for name in names)
    else:
        walk = os.walk(os.fsencode(root))
        files = (os.path.join(place, name) for place, _, names in walk for name in names)
    yield from ((path, 0, -1) for path in itertools.islice(filter(os.path.isfile, files), _FILES))


def _forget(path: bytes) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def _read(stretch: tuple[bytes, int, int]) -> int:
    path, offset, length = stretch
    if is_far(path):
        return len(stretch_of(*file_at(os.fsdecode(path)), offset, offset + length))
    with open(path, "rb") as file:
        file.seek(offset)
        return len(file.read(length))


LOOKS = (run_folder, cache, data)
