"""Where the images lie and how large they are: one row an image, arrays mapped from disk.

On disk a manifest is a folder: `<column>.npy` for each column, `names.npy` (uint8, all paths end to
end), `name_ends.npy` (int64), `meta.json` (hashes, classes, what was left out). Nothing is pickled.
"""

import errno
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastrot.data.faults import KINDS, decode_upright, kind_of, open_image, orientation_of
from fastrot.data.sources import Listing, open_source
from fastrot.errors import BadImage, UserError

_FORMAT = 2
_HEAD = 4096  # bytes of an image that enter the content hash
_TAIL = 1024  # a JPEG's end marker is looked for in its last bytes
_MANY = 4096  # files above which processes beat threads
_COLUMNS = {
    "file": np.int32,
    "offset": np.int64,
    "length": np.int64,
    "height": np.int32,
    "width": np.int32,
    "label": np.int64,
    "kind": np.uint8,
}


@dataclass(frozen=True)
class Manifest:
    """The rows of one data set.

    file int32 [N] into `paths`; offset, length int64 [N], bytes; height, width int32 [N], upright
    (after EXIF); label int64 [N]; kind uint8 [N] into faults.KINDS.
    content      hash of what the images are: what a resume checks.
    storage      hash of paths, sizes and times: what the cache checks.
    quarantined  [path, reason] of files that are no sound images.
    """

    file: NDArray[np.int32]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    height: NDArray[np.int32]
    width: NDArray[np.int32]
    label: NDArray[np.int64]
    kind: NDArray[np.uint8]
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

    def save(self, folder: Path) -> None:
        """Write the manifest; the folder appears whole or not at all."""
        scratch = folder.with_name(f".{folder.name}-{os.getpid()}")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        for name in (*_COLUMNS, "names", "name_ends"):
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
            arrays = {
                name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
                for name in (*_COLUMNS, "names", "name_ends")
            }
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
    listing = open_source(source)
    storage, lengths = _storage_hash(listing, max_pixels)
    key = hashlib.sha256(f"{_FORMAT} {os.path.abspath(source)} {max_pixels}".encode()).hexdigest()[:24]
    cached = cache / key
    try:
        if Manifest.load(cached).storage == storage:
            return cached
    except UserError:
        pass  # not there, or damaged: made anew
    manifest = _scan_all(source, listing, lengths, storage, max_pixels, track)
    try:
        manifest.save(cached)
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:  # another run indexed the same source meanwhile
            return cached
        raise UserError(
            f"{cached}: cannot be written ({error.strerror}); set FASTROT_CACHE to a folder that can"
        ) from None
    return cached


def _storage_hash(listing: Listing, max_pixels: int) -> tuple[str, NDArray[np.int64]]:
    """Hash of paths, sizes, times and extents; and each row's length, int64 [n] (-1: gone)."""
    sha = hashlib.sha256(f"{_FORMAT} {max_pixels}".encode())
    sizes = np.full(len(listing.files), -1, np.int64)
    for at, path in enumerate(listing.files):
        try:
            stat = os.stat(path)
        except OSError:
            continue
        sizes[at] = stat.st_size
        sha.update(path + b"\0%d %d\n" % (stat.st_size, stat.st_mtime_ns))
    for column in (listing.file, listing.offset, listing.length, listing.labels):
        sha.update(np.ascontiguousarray(column).tobytes())
    return sha.hexdigest(), np.where(listing.length < 0, sizes[listing.file], listing.length)


def scan_file(
    path: bytes, offset: int, length: int, max_pixels: int, raw_shape: tuple[int, int] = (0, 0)
) -> tuple[int, int, int, bytes] | str:
    """(upright height, width, kind, sha256 of the first 4 KiB), or why it is no sound image.

    offset, length  where the image lies in the file; length -1 = the whole file.
    raw_shape       height and width where these bytes are pixels, else (0, 0).
    """
    try:
        with open(path, "rb") as shard:
            file = shard
            if length >= 0:
                shard.seek(offset)
                file = io.BytesIO(shard.read(length))
                if len(file.getvalue()) < length:
                    return "its shard ends before it does"
            head = file.read(_HEAD)
            if not head:
                return "empty file"
            file.seek(0)
            image = None if any(raw_shape) else open_image(file)
            width, height = image.size if image else raw_shape[::-1]
            if width * height > max_pixels:
                return f"{width}x{height} is above data.max_pixels {max_pixels}"
            if image is None:
                return height, width, KINDS.index("RAW"), hashlib.sha256(head).digest()
            if orientation_of(image) >= 5:
                width, height = height, width
            kind = kind_of(head)
            if kind == "JPEG":
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - _TAIL))
                ends = b"\xff\xd9" in file.read()
            if kind != "JPEG" or not ends:  # without an end marker only decoding tells
                file.seek(0)
                decode_upright(file.read())
    except BadImage as error:
        return str(error)
    except OSError as error:
        return error.strerror or str(error)
    return height, width, KINDS.index(kind), hashlib.sha256(head).digest()


def _scan_all(source, listing, lengths, storage, max_pixels, track) -> Manifest:
    n = len(listing.file)
    paths = [listing.files[at] for at in listing.file.tolist()]
    raw_shape = np.zeros((n, 2), np.int32) if listing.raw_shape is None else listing.raw_shape
    workers = len(os.sched_getaffinity(0))
    pool = ProcessPoolExecutor(workers, get_context("forkserver")) if n > _MANY else ThreadPoolExecutor(workers)
    with pool:
        chunk = max(1, min(256, n // (workers * 4)))
        found = pool.map(
            scan_file,
            paths,
            listing.offset.tolist(),
            listing.length.tolist(),
            repeat(max_pixels),
            raw_shape.tolist(),
            chunksize=chunk,
        )
        scans = list(track(found, n, f"indexing {source}"))
    good = [row for row, scan in enumerate(scans) if not isinstance(scan, str)]
    bad = [
        [place(paths[row], int(listing.offset[row])), scan] for row, scan in enumerate(scans) if isinstance(scan, str)
    ]
    if not good:
        raise UserError(f"{source}: none of its {n} files is a sound image; the first: {bad[0][0]}: {bad[0][1]}")
    heights, widths, kinds = (np.array([scans[row][i] for row in good], np.int32) for i in range(3))
    labels, lengths = listing.labels[good], lengths[good]
    numbers = np.stack([heights, widths, labels, lengths], axis=1).astype("<i8")
    content = hashlib.sha256()
    for row, line in zip(good, numbers, strict=True):
        content.update(line.tobytes() + scans[row][3])
    return Manifest(
        file=listing.file[good].astype(np.int32),
        offset=listing.offset[good],
        length=lengths,
        height=heights,
        width=widths,
        label=labels,
        kind=kinds.astype(np.uint8),
        names=np.frombuffer(b"".join(listing.files), np.uint8),
        name_ends=np.cumsum([len(name) for name in listing.files]),
        source=source,
        classes=listing.classes,
        content=content.hexdigest(),
        storage=storage,
        skipped=dict(listing.skipped),
        quarantined=listing.faults + bad,
    )
