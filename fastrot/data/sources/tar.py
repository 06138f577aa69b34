"""WebDataset tar shards: `train-{000..146}.tar`, a glob, or one file; labels in .cls or .json, or none.

Which members are images, and which label is whose:

- A member's key is its path without its last extension: `a/22.00` of `a/22.00.jpg`. A leading `./` is no part of it.
- Names with a part that begins with a dot (macOS writes `._x` beside every `x`) are passed over and counted, as
  members of other kinds are.
- An image's label is that of its whole key, in the same shard, neighbour or not: `a/22.00.cls`; where that is not
  there or says nothing, `a/22.00.json`, whose `label`, else `cls`, is read. `22.cls` is nobody's but `22.jpg`'s.
- A file that says nothing (empty, or JSON without a label) changes nothing. A number is what int() or JSON reads as a
  whole one that 64 bits hold: `3`, ` 0003`, `+3`, `3.0`, `"3"`. Anything else is listed and is no label.
- WebDataset and the Hub cut a key at its first dot, so that `22.00.jpg` and `22.01.jpg` are fields of one sample. Here
  each is an image of its own, unless it stands beside an image of just that shorter key and has no label of its own:
  `x.seg.png` beside `x.jpg` is listed as a second image of its key, and is no row.
- A key that comes again later in a shard is another sample, as there; then neighbours alone belong together. Of two
  images or labels in one sample that differ, the second image is listed, and the labels are listed and not used.
"""

import codecs
import glob
import json
import os
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import groupby
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from fastrot.data.reading import again, exists, opened, refusal, states
from fastrot.data.scan import Track, workers_pool
from fastrot.data.sources.folder import EXTENSIONS
from fastrot.data.sources.listing import Listing
from fastrot.errors import Fault, UserError
from fastrot.remote import addresses, is_remote

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_LARGE = 1 << 30  # bytes above which processes beat threads
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZ": "bunzip2", b"\xfd7": "unxz", b"(\xb5": "unzstd"}
# what tarfile raises on damaged headers, besides its own: sizes that no integer or memory holds, headers of headers
_BROKEN = (tarfile.TarError, ValueError, OverflowError, MemoryError, RecursionError)
_MOST = 1 << 62  # bytes of a member
_IMAGE = "image"
_LABELS = (".cls", ".json")  # the first that says something decides
_LARGEST_LABEL = 1 << 24  # bytes


def open_source(spec: str, track: Track) -> Listing:
    """Shards in the order given, members in theirs; the module's docstring says which label is whose.

    Raises UserError where a shard is missing, compressed, or no tar file, or where none holds an image;
    Fault where a worker dies or a disk fails.
    """
    files = shards_of(spec)
    large = len(files) > 1 and int(states(files)[:, 0].sum()) > _LARGE
    images: list[NDArray[np.int64]] = []  # [n, 4] a shard: file, offset, length, label
    skipped: Counter[str] = Counter()
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
    """Absolute paths, or addresses, of the shards, in order. Raises UserError where one is missing."""
    if is_remote(spec):
        return [os.fsencode(address) for address in addresses(spec)]
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
    missing = [name for name in names if not exists(name)]
    if missing or not names:
        raise UserError(f"{spec}: no such file{f' {missing[0]} ({len(missing)} missing in all)' if missing else ''}")
    return names


@dataclass(frozen=True)
class _Member:
    """A member that is an image or may say a label. number: its place among the shard's; run: of neighbours that
    WebDataset would call one sample."""

    key: str
    sample: str
    kind: str
    name: str
    number: int
    run: int
    offset: int
    size: int


def _samples(path: bytes) -> tuple[NDArray[np.int64], Counter[str], list[list[str]]]:
    """[n, 3] (offset, length, label) of a shard's images, members skipped, and faults."""
    try:
        return again(_list, path)
    except OSError as error:
        raise refusal(f"{os.fsdecode(path)}: cannot be read", error) from None


def _list(path: bytes) -> tuple[NDArray[np.int64], Counter[str], list[list[str]]]:
    shard = os.fsdecode(path)
    skipped: Counter[str] = Counter()
    faults: list[list[str]] = []
    members = list(_members(path, shard, skipped, faults))
    plain = {member.key for member in members if member.kind == _IMAGE}
    rows: dict[int, tuple[int, int, int]] = {}
    with opened(path) as file:
        for sample in _together(members):
            images = [member for member in sample if member.kind == _IMAGE]
            known = len(faults)
            label = _label(file, shard, sample, faults)
            if not images and label is not None:
                faults += [[f"{shard}:{member.name}", "a label without an image"] for member in sample]
            elif not images and len(faults) == known:
                skipped["member of another kind"] += len(sample)
            for nth, image in enumerate(images):
                if nth or (image.sample != image.key and image.sample in plain and label is None):
                    faults.append([f"{shard}:{image.name}", "a second image of its key"])
                else:
                    rows[image.number] = image.offset, image.size, -1 if label is None else label
    return np.array([rows[number] for number in sorted(rows)], np.int64).reshape(-1, 3), skipped, faults


def _members(path: bytes, shard: str, skipped: Counter[str], faults: list[list[str]]) -> Iterator[_Member]:
    """The images and labels of a shard, in order."""
    run, before = 0, None
    for number, (member, content) in enumerate(_contents(path, shard, faults)):
        name = os.path.normpath(member.name)
        if any(part.startswith(".") and part != ".." for part in name.split("/")):
            skipped["hidden"] += 1
            continue
        key, extension = os.path.splitext(name)
        folder, base = os.path.split(name)
        sample = os.path.join(folder, base.partition(".")[0])
        run, before = run + (sample != before), sample
        kind = _IMAGE if os.fsencode(extension.lower()) in EXTENSIONS else extension.lower()
        if kind == _IMAGE or kind in _LABELS:
            yield _Member(key, sample, kind, member.name, number, run, content.offset_data, content.size)
        else:
            skipped["member of another kind"] += 1


def _together(members: list[_Member]) -> Iterator[list[_Member]]:
    """Members of one key; where a kind of them comes again, those that are neighbours."""
    by_key = defaultdict(list)
    for member in members:
        by_key[member.key].append(member)
    for same in by_key.values():
        if len({member.kind for member in same}) == len(same):
            yield same
        else:
            yield from (list(run) for _, run in groupby(same, lambda member: member.run))


def _contents(path: bytes, shard: str, faults: list[list[str]]) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarInfo]]:
    """(member, the member whose bytes it has) of a shard, as far as it can be read. Raises OSError."""
    with opened(path) as file:
        yield from _contents_of(file, shard, faults)


def _contents_of(
    file: BinaryIO, shard: str, faults: list[list[str]]
) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarInfo]]:
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 -- closed below; here only its own refusal is caught
    except _BROKEN as error:
        file.seek(0)
        tool = _COMPRESSED.get(file.read(2))
        what = f"is compressed; unpack it first: {tool} {shard}" if tool else f"is no tar file ({error})"
        raise UserError(f"{shard}: {what}") from None
    by_name: dict[str, tarfile.TarInfo] = {}
    with tar:
        try:
            for member in tar:
                if not 0 <= member.size < _MOST:  # below 0 the next header would lie before this one
                    raise tarfile.ReadError(f"a member of {member.size} bytes")
                content = by_name.get(member.linkname) if member.islnk() else member
                if member.issparse() or content is None:
                    reason = "a hard link to nothing before it" if member.islnk() else "a sparse member"
                    faults.append([f"{shard}:{member.name}", reason])
                elif content.isreg():
                    by_name[member.name] = content
                    yield member, content
        except _BROKEN as error:
            faults.append([shard, f"cannot be read to its end ({error})"])


def _label(file: BinaryIO, shard: str, sample: list[_Member], faults: list[list[str]]) -> int | None:
    """What the labels of one sample say, or None."""
    for kind in _LABELS:
        said: set[int] = set()
        for member in sample:
            if member.kind == kind:
                try:
                    number = _number(file, member)
                except (ValueError, RecursionError):
                    faults.append([f"{shard}:{member.name}", "its label is not an integer"])
                    continue
                if number is not None:
                    said.add(number)
        if len(said) > 1:
            faults.append([f"{shard}:{sample[0].name}", f"has labels that differ: {', '.join(map(str, sorted(said)))}"])
            return None
        if said:
            return said.pop()
    return None


def _number(file: BinaryIO, member: _Member) -> int | None:
    """The number that a label's bytes say; None where they say none. Raises ValueError, RecursionError."""
    if member.size > _LARGEST_LABEL:
        raise ValueError
    file.seek(member.offset)
    text = file.read(member.size)
    if len(text) < member.size:  # cut: 12 of 123
        raise ValueError
    text = text.removeprefix(codecs.BOM_UTF8).strip()
    if not text:
        return None
    value: object
    try:
        value = int(text)
    except ValueError:
        value = json.loads(text)
        if isinstance(value, dict) and member.kind == ".json":
            value = next((value[name] for name in ("label", "cls") if value.get(name) is not None), None)
        elif isinstance(value, list) and member.kind == ".json":
            value = None
    if value is None:
        return None
    if not isinstance(value, int | float | str) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError
    number = int(value)
    if not -(1 << 63) <= number < 1 << 63:
        raise ValueError
    return number
