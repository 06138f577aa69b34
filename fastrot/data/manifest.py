"""Where the images lie and how large they are: one row an image, arrays mapped from disk.

On disk a manifest is a folder: `<column>.npy` for each column, `names.npy` (uint8, all paths end to
end), `name_ends.npy` (int64), `file_state.npy` (int64, of files; older ones lack it), `meta.json` (hashes, classes,
what was left out). Nothing is pickled.
"""

import fcntl
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fastrot.data import jpeg, png, scan
from fastrot.data.images import KINDS, UNKNOWN, kind_of, open_image, orientation_of, upright
from fastrot.data.reading import GONE, states
from fastrot.data.scan import Track
from fastrot.data.sources import open_source, rules_of, shards_of
from fastrot.data.sources.listing import Listing
from fastrot.errors import BadImage, UserError
from fastrot.files import read_json, replacing

_FORMAT = 4  # 3 held no orientation
HEAD = 4096  # bytes of an image that enter the content hash
_HASHED = 4096  # files that enter the storage hash at once
COLUMNS = ("file", "offset", "length", "height", "width", "label", "kind", "orientation")


@dataclass(frozen=True)
class Manifest:
    """The rows of one data set.

    file int32 [N] into `paths`; offset, length int64 [N], bytes; height, width int32 [N], upright
    (after EXIF); label int64 [N], or int8 [N, 20] where an image has many: 1 present, 0 absent, -1
    ignored; kind uint8 [N] into images.KINDS; orientation uint8 [N], EXIF's 1..8 of the stored pixels, which
    decoders apply and do not read (images.UNKNOWN in manifests that were made before it was kept).
    file_state   int64 [F, 2], size in bytes and modification time in ns of each file as indexed; None in manifests that
                 were made before this was kept: then a file's size is known where it is one image.
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
    file_state: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.file)

    def path(self, row: int) -> bytes:
        """Absolute path of a row's file, as bytes."""
        file = int(self.file[row])
        start = int(self.name_ends[file - 1]) if file else 0
        return self.names[start : int(self.name_ends[file])].tobytes()

    def file_paths(self, files: NDArray[np.integer[Any]]) -> list[bytes]:
        """Absolute paths of these files, by their numbers in `file`."""
        names, ends = self.names.tobytes(), self.name_ends[files].tolist()
        starts = np.where(files > 0, self.name_ends[files - 1], 0).tolist()
        return [names[start:end] for start, end in zip(starts, ends, strict=True)]

    def name(self, row: int) -> str:
        """A row's place, for a person: its file, and where in it."""
        return place(self.path(row), int(self.offset[row]))

    def change(self, file: int, size: int, time_ns: int) -> str:
        """How a file of this size and time differs from the one that was indexed; "" = not at all, or not known."""
        if self.file_state is None:
            return ""
        now, was = (size, time_ns), tuple(self.file_state[file].tolist())
        return "" if now == was else _difference(now, was)

    def with_files_as_they_are(self) -> "Manifest":
        """The same rows, in files whose size and time are those of now."""
        return replace(self, file_state=states(self.file_paths(np.arange(len(self.name_ends)))))

    def some(self, rows: NDArray[np.int64]) -> "Manifest":
        """These rows alone; their content follows from this one's and which rows they are."""
        sha = hashlib.sha256(self.content.encode() + rows.astype("<i8").tobytes())
        return replace(self, **{name: getattr(self, name)[rows] for name in COLUMNS}, content=sha.hexdigest())

    def save(self, folder: Path) -> None:
        """Write the manifest; the folder appears whole or not at all."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        meta = {name: getattr(self, name) for name in _META} | {"format": _FORMAT}
        with replacing(folder, folder=True) as scratch:
            for name in (*COLUMNS, "names", "name_ends"):
                np.save(scratch / f"{name}.npy", getattr(self, name), allow_pickle=False)
            if self.file_state is not None:
                np.save(scratch / "file_state.npy", self.file_state, allow_pickle=False)
            (scratch / "meta.json").write_text(json.dumps(meta, indent=1))

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Map a saved manifest. Raises UserError where it is missing or damaged."""
        try:
            meta = vars(read_json(folder / "meta.json", _Meta))
            names = [name for name in (*COLUMNS, "names", "name_ends") if name != "orientation"]
            kept: dict[str, Any] = {name: _mapped(folder / f"{name}.npy") for name in names}
            for late in ("orientation", "file_state"):  # not in manifests of formats that held none
                path = folder / f"{late}.npy"
                kept[late] = _mapped(path) if path.exists() else None
            if kept["orientation"] is None:
                kept["orientation"] = np.full(len(kept["file"]), UNKNOWN, np.uint8)
            return cls(**kept, **meta)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{folder}: not a manifest that can be read ({error}); remove it") from None


def _mapped(path: Path) -> NDArray[Any]:
    """An array on disk; a plain view of the mapping: numpy's memmap costs microseconds an index."""
    array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array.view(np.ndarray)


def _when(time_ns: int) -> str:
    return str(np.datetime64(time_ns, "ns"))


def place(path: bytes, offset: int) -> str:
    """A file's name as text, whatever its bytes, and the offset where the image does not begin it."""
    name = os.fsdecode(path).encode("utf-8", "backslashreplace").decode()
    return f"{name} at byte {offset}" if offset else name


@dataclass(frozen=True)
class _Meta:
    """meta.json. source: any text, since a path may not be UTF-8."""

    source: Any
    classes: list[Any]
    content: str
    storage: str
    skipped: dict[str, int]
    quarantined: list[list[Any]]


_META = tuple(_Meta.__annotations__)


def index(source: str, cache: Path, max_pixels: int, track: Track) -> Path:
    """The folder of a source's manifest: as cached where the source has not changed, else new.

    cache  a folder; one entry a source and pixel limit.
    track  track(iterable, total, title) -> iterable: shows progress.
    Raises UserError where the source is missing, holds no sound image or a name that is no regular file, or the cache
    is unwritable; Fault where a disk fails.
    """
    files = shards_of(source)  # a few; else the listing alone knows all that may change
    listing = None if files else open_source(source, track)
    paths = listing.files if listing else files or []
    state = _states_of(source, paths)
    columns = (listing.file, listing.offset, listing.length, listing.labels) if listing else ()
    storage = _storage_hash(source, paths, state, columns, max_pixels)
    key = hashlib.sha256(b"%d %b %d" % (_FORMAT, os.fsencode(os.path.abspath(source)), max_pixels)).hexdigest()[:24]
    cached = cache / key
    if _holds(cached, storage):
        return _with_states(cached, state)
    listing = listing or open_source(source, track)
    try:
        with _alone(cache / f"{key}.lock", track, f"waiting for another process that indexes {source}"):
            if not _holds(cached, storage):  # else another run indexed the same source meanwhile
                unfinished = cache / f"{key}.parts"
                for other in set(unfinished.glob("*")) - {unfinished / storage}:
                    shutil.rmtree(other)  # of the source as it was
                _scan_all(source, listing, state, storage, max_pixels, unfinished / storage, track).save(cached)
                shutil.rmtree(unfinished)
    except OSError as error:
        raise _unwritable(cached, error) from None
    return cached


def _unwritable(cached: Path, error: OSError) -> UserError:
    return UserError(f"{cached}: cannot be written ({error.strerror}); set FASTROT_CACHE to a folder that can")


def _with_states(cached: Path, state: NDArray[np.int64]) -> Path:
    """The folder of a manifest, which gets the states of its files if it was made before they were kept."""
    kept = cached / "file_state.npy"
    if not kept.exists():
        try:
            with replacing(kept) as scratch, scratch.open("wb") as file:
                np.save(file, state, allow_pickle=False)
        except OSError as error:
            raise _unwritable(cached, error) from None
    return cached


def _states_of(source: str, paths: list[bytes]) -> NDArray[np.int64]:
    """`states` of files that must be there. Raises UserError for the first that is none: opening a pipe would wait."""
    state = states(paths)
    odd = np.flatnonzero(state[:, 0] < 0)
    if len(odd):
        what = "is gone since it was listed" if state[odd[0], 0] == GONE else "is a folder, a pipe or a device"
        what = f"{place(paths[odd[0]], 0)} {what}; regular files alone are read ({len(odd)} such in all)"
        raise UserError(f"{source}: {what}")
    return state


def _holds(folder: Path, storage: str) -> bool:
    """Whether a sound manifest of this storage lies there."""
    try:
        return Manifest.load(folder).storage == storage
    except UserError:
        return False  # not there, or damaged: made anew


@contextmanager
def _alone(lock: Path, track: Track, title: str) -> Iterator[None]:
    """Wait, and say so, until no other process holds this lock; then hold it."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            for _ in track([file], 1, title):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _storage_hash(
    source: str, files: list[bytes], state: NDArray[np.int64], columns: tuple[NDArray[Any], ...], max_pixels: int
) -> str:
    """Hash of paths, sizes, times, what a listing says of them, and the rules by which it was made."""
    sha = hashlib.sha256(f"{_FORMAT} {max_pixels}{rules_of(source)}".encode())
    for at in range(0, len(files), _HASHED):
        sha.update(b"\0".join(files[at : at + _HASHED]) + state[at : at + _HASHED].tobytes())
    for column in columns:
        sha.update(np.ascontiguousarray(column).tobytes())
    return sha.hexdigest()


def changed_files(manifest: Manifest, most: int = 100_000) -> tuple[list[list[str]], int]:
    """[path, what differs] of files that are not as they were indexed, and how many were looked at.

    most  files looked at, spread evenly where there are more. Raises UserError or Fault where the system cannot tell.
    """
    files, row = np.unique(manifest.file, return_index=True)
    if len(files) > most:
        some = np.linspace(0, len(files) - 1, most).astype(np.int64)
        files, row = files[some], row[some]
    paths = manifest.file_paths(files)
    now = states(paths)
    if manifest.file_state is not None:
        was = manifest.file_state[files]
    else:  # a file that is one image has its size; a shard's images have an offset
        was = np.where((manifest.offset[row] == 0)[:, None] & (True, False), manifest.length[row][:, None], now)
    odd = np.flatnonzero((now != was).any(axis=1) | (now[:, 0] < 0)).tolist()
    return [[place(paths[at], 0), _difference(now[at].tolist(), was[at].tolist())] for at in odd], len(files)


def _difference(now: Sequence[int], was: Sequence[int]) -> str:
    if now[0] < 0:
        return "gone" if now[0] == GONE else "no regular file any more"
    if now[0] != was[0]:
        return f"changed: {now[0]} bytes, {was[0]} when indexed"
    return f"changed: written {_when(now[1])}, {_when(was[1])} when indexed"


def content_hash(
    height: NDArray[Any], width: NDArray[Any], label: NDArray[Any], length: NDArray[Any], head: NDArray[np.uint8]
) -> str:
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
    Raises OSError where the file cannot be read: that may pass, and is nothing its bytes say.
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


def _scan_all(
    source: str,
    listing: Listing,
    state: NDArray[np.int64],
    storage: str,
    max_pixels: int,
    unfinished: Path,
    track: Track,
) -> Manifest:
    def words_of(first: int, last: int) -> Iterable[tuple[Any, ...]]:
        paths = [listing.files[at] for at in listing.file[first:last].tolist()]
        columns = (listing.offset, listing.length, raw_shape)
        return zip(paths, *(column[first:last].tolist() for column in columns), strict=True)

    n = len(listing.file)
    raw_shape = np.zeros((n, 2), np.int32) if listing.raw_shape is None else listing.raw_shape
    look = partial(scan_file, max_pixels=max_pixels)

    def name_of(row: int) -> str:
        return place(listing.files[listing.file[row]], int(listing.offset[row]))

    found = scan.look_at(n, words_of, look, unfinished, track, f"indexing {source}", name_of)
    bad = [[name_of(row), reason] for row, reason in found.reason.items()]
    if len(bad) == n:
        raise UserError(f"{source}: none of its {n} files is a sound image; the first: {bad[0][0]}: {bad[0][1]}")
    good = found.sound
    lengths = np.where(listing.length < 0, state[listing.file, 0], listing.length)
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
        file_state=state,
    )
