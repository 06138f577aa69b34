"""WebDataset tar shards: `train-{000..146}.tar`, a glob, or one file; labels in .cls or .json, or none."""

import glob
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool

import numpy as np
from numpy.typing import NDArray

from fastrot.data.scan import workers_pool
from fastrot.data.sources.folder import EXTENSIONS
from fastrot.data.sources.listing import Listing
from fastrot.errors import Fault, UserError

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_LARGE = 1 << 30  # bytes above which processes beat threads
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZ": "bunzip2", b"\xfd7": "unxz", b"(\xb5": "unzstd"}


def open_source(spec: str, track: Callable) -> Listing:
    """Shards in the order given, members in theirs; a sample is a run of members of one key.

    Raises UserError where a shard is missing, compressed, or no tar file, or where none holds an image;
    Fault where a worker dies.
    """
    files = shards_of(spec)
    large = len(files) > 1 and sum(os.path.getsize(path) for path in files) > _LARGE
    images: list[NDArray[np.int64]] = []  # [n, 4] a shard: file, offset, length, label
    skipped: Counter = Counter()
    faults: list[list[str]] = []
    with workers_pool(processes=large) as pool:
        listed = pool.map(_samples, files)
        try:
            for found, others, wrong in track(listed, len(files), f"listing {spec}, {len(files):,} shards"):
                images.append(np.insert(found, 0, len(images), axis=1))
                skipped += others
                faults += wrong
        except BrokenProcessPool:
            raise Fault(f"listing {spec}: a worker process died (out of memory, or killed); start again") from None
    file, offset, length, labels = np.concatenate(images).T
    if not len(file):
        raise UserError(f"{spec}: {len(files)} shards hold no image; expected members KEY.jpg, and KEY.cls for labels")
    return Listing(files, file, offset, length, labels, [], skipped, faults)


def shards_of(spec: str) -> list[bytes]:
    """Absolute paths of the shards, in order. Raises UserError where one is missing."""
    return [os.fsencode(os.path.abspath(name)) for name in _expand(spec)]


def _expand(spec: str) -> list[str]:
    match = _RANGE.search(spec)
    if match:
        first, last = int(match[1]), int(match[2])
        numbers = [str(n).zfill(len(match[1])) for n in range(first, last + 1)]
        names = [name for n in numbers for name in _expand(spec[: match.start()] + n + spec[match.end() :])]
    elif glob.has_magic(spec):
        names = sorted(glob.glob(spec), key=os.fsencode)
    else:
        names = [spec]
    missing = [name for name in names if not os.path.exists(name)]
    if missing or not names:
        raise UserError(f"{spec}: no such file{f' {missing[0]} ({len(missing)} missing in all)' if missing else ''}")
    return names


def _samples(path: bytes) -> tuple[NDArray[np.int64], Counter, list[list[str]]]:
    """[n, 3] (offset, length, label) of each sample's image in one shard, members skipped, and faults."""
    shard = os.fsdecode(path)
    found: list[tuple[int, int, int]] = []
    skipped: Counter = Counter()
    faults: list[list[str]] = []
    key, image, label = None, None, -1

    def finish() -> None:
        if image is not None:
            found.append((image.offset_data, image.size, label))

    for member, content in _members(path, shard, faults):
        folder, name = os.path.split(member.name)
        stem, _, extension = name.partition(".")
        if (folder, stem) != key:
            finish()
            key, image, label = (folder, stem), None, -1
        kind = "." + extension.rpartition(".")[2].lower()
        if os.fsencode(kind) in EXTENSIONS:
            if image is None:
                image = content
            else:
                faults.append([f"{shard}:{member.name}", "a second image of its key"])
        elif kind in (".cls", ".json"):
            label = _label(path, content, kind, f"{shard}:{member.name}", faults)
        else:
            skipped["member of another kind"] += 1
    finish()
    return np.array(found, np.int64).reshape(-1, 3), skipped, faults


def _members(path: bytes, shard: str, faults: list[list[str]]):
    """(member, the member whose bytes it has) of a shard, as far as it can be read."""
    try:
        tar = tarfile.open(path, "r:")  # noqa: SIM115 -- closed below; here only its own refusal is caught
    except OSError as error:
        raise UserError(f"{shard}: cannot be read ({error.strerror})") from None
    except tarfile.TarError as error:
        with open(path, "rb") as file:
            tool = _COMPRESSED.get(file.read(2))
        what = f"is compressed; unpack it first: {tool} {shard}" if tool else f"is no tar file ({error})"
        raise UserError(f"{shard}: {what}") from None
    by_name: dict[str, tarfile.TarInfo] = {}
    with tar:
        try:
            for member in tar:
                content = by_name.get(member.linkname) if member.islnk() else member
                if member.issparse() or content is None:
                    reason = "a hard link to nothing before it" if member.islnk() else "a sparse member"
                    faults.append([f"{shard}:{member.name}", reason])
                elif content.isreg():
                    by_name[member.name] = content
                    yield member, content
        except tarfile.TarError as error:
            faults.append([shard, f"cannot be read to its end ({error})"])


def _label(path: bytes, member: tarfile.TarInfo, kind: str, name: str, faults: list[list[str]]) -> int:
    with open(path, "rb") as file:
        file.seek(member.offset_data)
        text = file.read(min(member.size, 1 << 20))
    try:
        value = json.loads(text)
        if kind == ".json":
            value = value.get("label", value.get("cls", -1)) if isinstance(value, dict) else value
        return int(value)
    except (ValueError, TypeError):
        faults.append([name, "its label is not an integer"])
        return -1
