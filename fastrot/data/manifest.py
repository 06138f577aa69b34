"""Where the images lie and how large they are: one row an image, arrays mapped from disk.

On disk a manifest is a folder: `<column>.npy` for each column, `names.npy` (uint8, all paths end to
end), `name_ends.npy` (int64), `meta.json` (hashes, classes, what was left out). Nothing is pickled.
"""

import fcntl
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from fastrot.data import jpeg, png, scan
from fastrot.data.images import KINDS, UNKNOWN, kind_of, open_image, orientation_of, upright
from fastrot.data.sources import open_source, shards_of
from fastrot.errors import BadImage, UserError

_FORMAT = 4  # 3 held no orientation
HEAD = 4096  # bytes of an image that enter the content hash
_STATS = 4096  # files a thread asks the file system about at once
COLUMNS = ("file", "offset", "length", "height", "width", "label", "kind", "orientation")


@dataclass(frozen=True)
class Manifest:
    """The rows of one data set.

    file int32 [N] into `paths`; offset, length int64 [N], bytes; height, width int32 [N], upright
    (after EXIF); label int64 [N], or int8 [N, 20] where an image has many: 1 present, 0 absent, -1
    ignored; kind uint8 [N] into images.KINDS; orientation uint8 [N], EXIF's 1..8 of the stored pixels, which
    decoders apply and do not read (images.UNKNOWN in manifests that were made before it was kept).
    content      hash of what the images are: what a resume checks.
    storage      hash of paths, sizes and times: what the cache checks.
    quarantined  [path, reason] of files that are no sound images.
    """

    file: NDArray[np.int32]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    height: NDArray[np.int32]
    width: NDArray[np.int32]
    label: NDArray[np.int64] | NDArray[np.int8]
    kind: NDArray[np.uint8]
    orientation: NDArray[np.uint8]
    names: NDArray[np.uint8]
    name_ends: NDArray[np.int64]
    source: str
    classes: list[str]
    content: str
    storage: str
    skipped: dict[str, int]
    quarantined: list[list[str]]

    def __len__(self) -> int:
        return len(self.file)

    def path(self, row: int) -> bytes:
        """Absolute path of a row's file, as bytes."""
        file = int(self.file[row])
        start = int(self.name_ends[file - 1]) if file else 0
        return self.names[start : int(self.name_ends[file])].tobytes()

    def name(self, row: int) -> str:
        """A row's place, for a person: its file, and where in it."""
        return place(self.path(row), int(self.offset[row]))

    def some(self, rows: NDArray[np.int64]) -> "Manifest":
        """These rows alone; their content follows from this one's and which rows they are."""
        sha = hashlib.sha256(self.content.encode() + rows.astype("<i8").tobytes())
        return replace(self, **{name: getattr(self, name)[rows] for name in COLUMNS}, content=sha.hexdigest())

    def save(self, folder: Path) -> None:
        """Write the manifest; the folder appears whole or not at all."""
        scratch = folder.with_name(f".{folder.name}-{os.getpid()}")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        for name in (*COLUMNS, "names", "name_ends"):
            np.save(scratch / f"{name}.npy", getattr(self, name), allow_pickle=False)
        meta = {name: getattr(self, name) for name in _META} | {"format": _FORMAT}
        (scratch / "meta.json").write_text(json.dumps(meta, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Map a saved manifest. Raises UserError where it is missing or damaged."""
        try:
            meta = json.loads((folder / "meta.json").read_text())
            arrays = {  # plain views of the mappings: numpy's memmap costs microseconds an index
                name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False).view(np.ndarray)
                for name in (*COLUMNS, "names", "name_ends")
                if name != "orientation" or meta["format"] > 3
            }
            arrays.setdefault("orientation", np.full(len(arrays["file"]), UNKNOWN, np.uint8))
            return cls(**arrays, **{name: meta[name] for name in _META})
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{folder}: not a manifest that can be read ({error}); remove it") from None


def place(path: bytes, offset: int) -> str:
    """A file's name as text, whatever its bytes, and the offset where the image does not begin it."""
    name = os.fsdecode(path).encode("utf-8", "backslashreplace").decode()
    return f"{name} at byte {offset}" if offset else name


_META = ("source", "classes", "content", "storage", "skipped", "quarantined")


def index(source: str, cache: Path, max_pixels: int, track: Callable) -> Path:
    """The folder of a source's manifest: as cached where the source has not changed, else new.

    cache  a folder; one entry a source and pixel limit.
    track  track(iterable, total, title) -> iterable: shows progress.
    Raises UserError where the source is missing, holds no sound image, or the cache is unwritable.
    """
    files = shards_of(source)  # a few; else the listing alone knows all that may change
    listing = None if files else open_source(source, track)
    columns = (listing.file, listing.offset, listing.length, listing.labels) if listing else ()
    storage, sizes = _storage_hash(files or listing.files, columns, max_pixels)
    key = hashlib.sha256(b"%d %b %d" % (_FORMAT, os.fsencode(os.path.abspath(source)), max_pixels)).hexdigest()[:24]
    cached = cache / key
    if _holds(cached, storage):
        return cached
    listing = listing or open_source(source, track)
    try:
        with _alone(cache / f"{key}.lock", track, f"waiting for another process that indexes {source}"):
            if not _holds(cached, storage):  # else another run indexed the same source meanwhile
                unfinished = cache / f"{key}.parts"
                for other in set(unfinished.glob("*")) - {unfinished / storage}:
                    shutil.rmtree(other)  # of the source as it was
                _scan_all(source, listing, sizes, storage, max_pixels, unfinished / storage, track).save(cached)
                shutil.rmtree(unfinished)
    except OSError as error:
        raise UserError(
            f"{cached}: cannot be written ({error.strerror}); set FASTROT_CACHE to a folder that can"
        ) from None
    return cached


def _holds(folder: Path, storage: str) -> bool:
    """Whether a sound manifest of this storage lies there."""
    try:
        return Manifest.load(folder).storage == storage
    except UserError:
        return False  # not there, or damaged: made anew


@contextmanager
def _alone(lock: Path, track: Callable, title: str) -> Iterator[None]:
    """Wait, and say so, until no other process holds this lock; then hold it."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            for _ in track([file], 1, title):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _storage_hash(files: list[bytes], columns: tuple[NDArray, ...], max_pixels: int) -> tuple[str, NDArray[np.int64]]:
    """Hash of paths, sizes, times and what a listing says of them; and the sizes, int64 [n] (-1: gone)."""
    sha = hashlib.sha256(f"{_FORMAT} {max_pixels}".encode())
    blocks = [files[at : at + _STATS] for at in range(0, len(files), _STATS)]
    with ThreadPoolExecutor() as pool:  # a network's file system answers many at once
        stats = list(pool.map(_stats, blocks))
    for block, stat in zip(blocks, stats, strict=True):
        sha.update(b"\0".join(block) + stat.tobytes())
    for column in columns:
        sha.update(np.ascontiguousarray(column).tobytes())
    return sha.hexdigest(), np.concatenate(stats)[:, 0]


def _stats(paths: list[bytes]) -> NDArray[np.int64]:
    """Size and modification time in ns of each file, int64 [n, 2]; -1 where it is gone."""
    found = np.full((len(paths), 2), -1, np.int64)
    for at, path in enumerate(paths):
        try:
            stat = os.stat(path)
        except OSError:
            continue
        found[at] = stat.st_size, stat.st_mtime_ns
    return found


def content_hash(height: NDArray, width: NDArray, label: NDArray, length: NDArray, head: NDArray[np.uint8]) -> str:
    """sha256 over the rows' bytes in order: what the images are, wherever they lie.

    A row's bytes: height, width, label, length as <i8, then `head`, the sha256 of the image's first
    4 KiB. With many labels an image, its label is i1 [20] instead.
    """
    sha = hashlib.sha256()
    for first in range(0, len(height), 1 << 16):
        some = slice(first, first + (1 << 16))
        numbers = (height, width, label, length)
        kinds = ("<i8", "<i8", "<i8" if label.ndim == 1 else "i1", "<i8")
        columns = [np.ascontiguousarray(a[some].astype(k)) for a, k in zip(numbers, kinds, strict=True)]
        columns = [column.view(np.uint8).reshape(len(column), -1) for column in (*columns, head[some])]
        sha.update(np.concatenate(columns, axis=1).tobytes())
    return sha.hexdigest()


def scan_file(
    path: bytes, offset: int, length: int, raw_shape: tuple[int, int], max_pixels: int
) -> tuple[int, int, int, int, bytes] | str:
    """(upright height, width, kind, orientation, sha256 of the first 4 KiB), or why it is no sound image.

    offset, length  where the image lies in the file; length -1 = the whole file.
    raw_shape       height and width where these bytes are pixels, else (0, 0).
    """
    try:
        with open(path, "rb") as shard:
            file: BinaryIO = shard
            if length >= 0:
                shard.seek(offset)
                part = shard.read(length)
                if len(part) < length:
                    return "its shard ends before it does"
                file = io.BytesIO(part)
            head = file.read(HEAD)
            if not head:
                return "empty file"
            kind = "RAW" if any(raw_shape) else kind_of(head)
            if kind == "RAW":
                height, width, orientation = *raw_shape, 1
                _check_size(height, width, max_pixels)
            else:
                height, width, orientation = _judged(file, kind, max_pixels)
    except BadImage as error:
        return str(error)
    except OSError as error:
        return error.strerror or str(error)
    return height, width, KINDS.index(kind), orientation, hashlib.sha256(head).digest()


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadImage(f"{width}x{height} is above data.max_pixels {max_pixels}")


def _judged(file: BinaryIO, kind: str, max_pixels: int) -> tuple[int, int, int]:
    """Upright height, width, and the orientation of a sound image. Raises BadImage, before a pixel is allocated where
    there are too many. A JPEG with its end is not decoded: its header tells, and no decoder ends before the window."""
    file.seek(0)
    image = open_image(file)
    width, height = image.size
    _check_size(height, width, max_pixels)
    if kind == "JPEG" and jpeg.ends(file):
        orientation = orientation_of(image)
        return (width, height, orientation) if orientation >= 5 else (height, width, orientation)
    file.seek(0)
    data = file.read()
    if kind == "PNG" and not png.ends(data):  # Pillow shows one that has all its pixels, others refuse it
        raise BadImage("is truncated (its end chunk is missing)")
    image = open_image(io.BytesIO(data))
    orientation = orientation_of(image)
    width, height = upright(image, orientation).size
    return height, width, orientation


def _scan_all(source, listing, sizes, storage, max_pixels, unfinished, track) -> Manifest:
    def words_of(first: int, last: int):
        paths = [listing.files[at] for at in listing.file[first:last].tolist()]
        columns = (listing.offset, listing.length, raw_shape)
        return zip(paths, *(column[first:last].tolist() for column in columns), strict=True)

    n = len(listing.file)
    raw_shape = np.zeros((n, 2), np.int32) if listing.raw_shape is None else listing.raw_shape
    look = partial(scan_file, max_pixels=max_pixels)
    found = scan.look_at(n, words_of, look, unfinished, track, f"indexing {source}")
    bad = [
        [place(listing.files[listing.file[row]], int(listing.offset[row])), reason]
        for row, reason in found.reason.items()
    ]
    if len(bad) == n:
        raise UserError(f"{source}: none of its {n} files is a sound image; the first: {bad[0][0]}: {bad[0][1]}")
    good = found.sound
    lengths = np.where(listing.length < 0, sizes[listing.file], listing.length)
    height, width, label, length = found.height[good], found.width[good], listing.labels[good], lengths[good]
    return Manifest(
        file=listing.file[good].astype(np.int32),
        offset=listing.offset[good],
        length=length,
        height=height,
        width=width,
        label=label,
        kind=found.kind[good],
        orientation=found.orientation[good],
        names=np.frombuffer(b"".join(listing.files), np.uint8),
        name_ends=np.cumsum([len(name) for name in listing.files]),
        source=source,
        classes=listing.classes,
        content=content_hash(height, width, label, length, found.head[good]),
        storage=storage,
        skipped=dict(listing.skipped),
        quarantined=listing.faults + bad,
    )
