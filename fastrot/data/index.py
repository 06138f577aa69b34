"""A source's images looked at once: what is sound, how large, which way up; kept in the cache as a manifest."""

import fcntl
import hashlib
import io
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fastrot import machine, terminal
from fastrot.data import jpeg, png, scan
from fastrot.data.coding import ODD, coding_of, coding_of_jpeg
from fastrot.data.images import KINDS, kind_of, open_image, orientation_of, upright
from fastrot.data.manifest import FORMAT, HEAD, Manifest, content_hash, place
from fastrot.data.reading import GONE, opened, states
from fastrot.data.scan import Track
from fastrot.data.sources import in_place, open_source, rules_of, shards_of
from fastrot.data.sources.listing import Listing
from fastrot.errors import BadImage, UserError
from fastrot.files import replacing
from fastrot.remote import absolute, is_remote, shown

_HASHED = 4096  # files that enter the storage hash at once


def in_cache(source: str | None, max_pixels: int, key: str, track: Track = terminal.track) -> Path:
    """`index` in this machine's cache, progress shown; source: what `key` of the config names. Raises as it does."""
    if source is None:
        raise UserError(f"{key} is not set; name an image folder, as in {key}=/path, or list:FILE")
    if is_remote(source) and not in_place(source):
        raise UserError(f"{key}: {shown(source)} is not on this machine; fastrot stage {shown(source)} DIR")
    return index(source, machine.cache_folder() / "manifests", max_pixels, track)


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
    key = hashlib.sha256(b"%d %b %d" % (FORMAT, os.fsencode(absolute(source)), max_pixels)).hexdigest()[:24]
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
    sha = hashlib.sha256(f"{FORMAT} {max_pixels}{rules_of(source)}".encode())
    for at in range(0, len(files), _HASHED):
        sha.update(b"\0".join(files[at : at + _HASHED]) + state[at : at + _HASHED].tobytes())
    for column in columns:
        sha.update(np.ascontiguousarray(column).tobytes())
    return sha.hexdigest()


def scan_file(
    path: bytes, offset: int, length: int, raw_shape: tuple[int, int], max_pixels: int
) -> tuple[int, int, int, int, int, bytes] | str:
    """(upright height, width, kind, orientation, coding, sha256 of the first 4 KiB), or why it is no sound image.

    offset, length  where the image lies in the file; length -1 = the whole file.
    raw_shape       height and width where these bytes are pixels, else (0, 0).
    Raises OSError where the file cannot be read: that may pass, and is nothing its bytes say.
    """
    try:
        with opened(path) as shard:
            file = shard
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
                height, width, orientation, coding = *raw_shape, 1, ODD
                _check_size(height, width, max_pixels)
            else:
                height, width, orientation, coding = _judged(file, kind, max_pixels)
    except BadImage as error:
        return str(error)
    return height, width, KINDS.index(kind), orientation, coding, hashlib.sha256(head).digest()


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadImage(f"{width}x{height} is above data.max_pixels {max_pixels}")


def _judged(file: BinaryIO, kind: str, max_pixels: int) -> tuple[int, int, int, int]:
    """Upright height, width, orientation and coding of a sound image. Raises BadImage, before a pixel is allocated where
    there are too many. A JPEG with its end is not decoded: its header tells, and no decoder ends before the window."""
    file.seek(0)
    image = open_image(file)
    width, height = image.size
    _check_size(height, width, max_pixels)
    frame = jpeg.frame_in(file) if kind == "JPEG" else None
    if frame and jpeg.too_many_scans(file, frame):
        raise BadImage(f"has more than {jpeg.MOST_SCANS} scans")
    if frame and jpeg.ends(file, frame):
        orientation = orientation_of(image)
        size = (width, height) if orientation >= 5 else (height, width)
        return *size, orientation, coding_of_jpeg(frame)
    file.seek(0)
    data = file.read()
    if frame and jpeg.END not in data[frame.data :]:  # Pillow shows one whose coded bits are all there, likewise
        raise BadImage("is truncated (its end marker is missing)")
    if kind == "PNG" and not png.ends(data):  # Pillow shows one that has all its pixels, others refuse it
        raise BadImage("is truncated (its end chunk is missing)")
    image = open_image(io.BytesIO(data))
    orientation = orientation_of(image)
    width, height = upright(image, orientation).size
    return height, width, orientation, coding_of(kind, data)


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
        coding=found.coding[good],
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
