"""FFCV's file format, .beton version 2: its tables read after they are checked, and written.

A file is: header; one descriptor a field; the metadata table, one record a sample; zeros up to a page; pages
of sample data, none of which crosses a page; the allocation table, to the file's end. All little-endian.
What we write also holds a CRC-32 of each sample, between the pages and the allocation table; where, and the
tables' own CRC-32, stands in the image field's arguments, which FFCV leaves unread.
"""

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fastrot.data.reading import again, opened, refusal
from fastrot.errors import UserError
from fastrot.remote import absolute

JPEG, RAW = 0, 1
MOST_SIDE = 65500  # libjpeg's limit; the format's own is 65535
_VERSION = 2
_LEAST_PAGE, _USUAL_PAGE, _MOST_PAGE = 1 << 21, 1 << 23, 1 << 31
_HEADER = np.dtype([("version", "<u2"), ("fields", "<u2"), ("page", "<u4"), ("samples", "<u8"), ("allocations", "<u8")])
_FIELD = np.dtype([("type", "u1"), ("name", "u1", 16), ("arguments", "u1", 1024)])
_ALLOCATION = np.dtype([("sample", "<u8"), ("pointer", "<u8"), ("size", "<u8")])
_IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("pointer", "<u8")])
_STRETCH = np.dtype([("pointer", "<u8"), ("size", "<u8")])
_FLOAT_FIELD, _INT_FIELD, _IMAGE_FIELD = 0, 1, 2
_TYPES = {
    _FLOAT_FIELD: ("float", np.dtype("<f8")),
    _INT_FIELD: ("int", np.dtype("<i8")),
    _IMAGE_FIELD: ("image", _IMAGE),
    3: ("bytes", _STRETCH),
    4: ("array", np.dtype("<u8")),
    5: ("JSON", _STRETCH),
    6: ("tensor", np.dtype("<u8")),
}
_SUMS = np.dtype([("mark", "S16"), ("pointer", "<u8"), ("tables", "<u4")])
_MARK = b"fastrot crc32 1"
_SAMPLE = np.dtype([("", _IMAGE), ("", "<i8")], align=True)  # of the files we write: image, label


@dataclass(frozen=True)
class Table:
    """The samples of a file in their order; checked: every stretch lies in the file, alone.

    offset, length int64 [n], bytes; mode uint8 [n], JPEG or RAW; height, width int32 [n], as the file
    says (for JPEG its own header decides); label int64 [n], -1 where there is none.
    checksum  uint32 [n], CRC-32 of each stretch; None in files of another writer.
    """

    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    mode: NDArray[np.uint8]
    height: NDArray[np.int32]
    width: NDArray[np.int32]
    label: NDArray[np.int64]
    checksum: NDArray[np.uint32] | None


def read_table(path: str | bytes | os.PathLike[str]) -> Table:
    """The checked tables of a .beton. Raises UserError with what is wrong with it; Fault where the disk fails."""
    name = os.fsdecode(path)
    try:
        return again(_opened, path)
    except _Wrong as error:
        raise UserError(f"{name}: {error}; write it again, or get a whole copy") from None
    except OSError as error:
        raise refusal(f"{name}: cannot be read", error) from None


def _opened(path: str | bytes | os.PathLike[str]) -> Table:
    with opened(os.fsencode(absolute(os.fsdecode(path)))) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        return _read(file, size)


class _Wrong(Exception):
    """What is wrong with a file."""


def _need(held: bool, what: str) -> None:
    if not held:
        raise _Wrong(what)


def _none(bad: NDArray[np.bool_], what: Callable[[int], str]) -> None:
    """Raises for the first that is bad."""
    if bad.any():
        raise _Wrong(what(int(bad.argmax())))


def _records(file: BinaryIO, kind: np.dtype[Any], count: int, end: int, what: str) -> NDArray[Any]:
    """The next `count` records; they must end at or before byte `end`."""
    _need(file.tell() + count * kind.itemsize <= end, f"{what} would end after byte {end}: truncated or damaged")
    data = file.read(count * kind.itemsize)
    _need(len(data) == count * kind.itemsize, f"{what} cannot be read to its end")
    return np.frombuffer(data, kind)


def _read(file: BinaryIO, size: int) -> Table:
    _need(size >= _HEADER.itemsize, f"has {size} bytes, too few for a .beton")
    header = _records(file, _HEADER, 1, size, "its header")[0]
    version, page, n, end = (int(header[key]) for key in ("version", "page", "samples", "allocations"))
    _need(version == _VERSION, f"is a .beton of version {version} or none at all; version {_VERSION} is read")
    _need(
        _LEAST_PAGE <= page <= _MOST_PAGE and page & (page - 1) == 0,
        f"its page size {page} is no power of two of at least {_LEAST_PAGE}",
    )
    _need(n > 0, "holds no sample")
    _need(end <= size, f"its allocation table would begin at byte {end} of {size}: truncated, or never finished")
    fields = _records(file, _FIELD, int(header["fields"]), end, "its list of fields")
    image, label = _chosen(fields)
    kind = np.dtype([(str(at), _TYPES[field][1]) for at, field in enumerate(fields["type"].tolist())], align=True)
    metadata = _records(file, kind, n, end, "its metadata table")
    begin = file.tell()
    _need((size - end) % _ALLOCATION.itemsize == 0, "its allocation table is cut")
    file.seek(end)
    allocations = _records(file, _ALLOCATION, (size - end) // _ALLOCATION.itemsize, size, "its allocation table")
    images = metadata[str(image)]
    length = _lengths(images, allocations, begin, end, page)
    checksum, data_end = _checksums(file, fields[image], n, end, metadata, allocations)
    _none(images["pointer"] + length.astype(np.uint64) > data_end, lambda at: f"sample {at} runs into its checksums")
    return Table(
        offset=images["pointer"].astype(np.int64),
        length=length,
        mode=images["mode"].copy(),
        height=images["height"].astype(np.int32),
        width=images["width"].astype(np.int32),
        label=np.full(n, -1, np.int64) if label is None else metadata[str(label)].astype(np.int64),
        checksum=checksum,
    )


def _chosen(fields: NDArray[Any]) -> tuple[int, int | None]:
    """Which field is the image, and which the label if any."""
    types = fields["type"].tolist()
    names = [ascii(bytes(name).split(b"\0")[0].decode("latin-1"))[1:-1] for name in fields["name"]]  # in a line
    for name, field in zip(names, types, strict=True):
        _need(field in _TYPES, f"its field '{name}' is of a type of its own ({field}), which is not known here")
    images = [at for at, field in enumerate(types) if field == _IMAGE_FIELD]
    _need(len(images) == 1, f"holds {len(images)} image fields, one is needed; its fields: {', '.join(names)}")
    ints = [at for at, field in enumerate(types) if field == _INT_FIELD]
    if len(ints) > 1:
        ints = [at for at in ints if names[at] == "label"]
        _need(len(ints) == 1, f"holds several int fields, none of them named label: {', '.join(names)}")
    others = [f"{names[at]} ({_TYPES[field][0]})" for at, field in enumerate(types) if at not in (*images, *ints)]
    _need(bool(ints) or not others, f"its labels are no int field but {', '.join(others)}; one int an image is read")
    return images[0], ints[0] if ints else None


def _lengths(images: NDArray[Any], allocations: NDArray[Any], begin: int, end: int, page: int) -> NDArray[np.int64]:
    """Bytes of each sample's image, int64 [n], by the allocation table."""
    allocations = allocations[allocations["size"] > 0]
    pointer, size = allocations["pointer"], allocations["size"]

    def outside(at: int) -> str:
        return f"a stretch of {size[at]} bytes at byte {pointer[at]} is not inside its data, {begin} to {end}"

    _none((pointer < begin) | (pointer > end) | (size > end), outside)  # bounds both: their sum does not overflow
    _none(pointer + size > end, outside)
    last = pointer + size - np.uint64(1)
    _none(pointer // page != last // page, lambda at: f"a stretch at byte {pointer[at]} crosses a page of {page} bytes")
    order = np.argsort(pointer, kind="stable")
    starts, sizes = pointer[order], size[order]
    _none(starts[:-1] + sizes[:-1] > starts[1:], lambda at: f"two of its stretches overlap at byte {starts[at + 1]}")

    wanted, mode = images["pointer"], images["mode"]
    found = np.minimum(np.searchsorted(starts, wanted), max(0, len(starts) - 1))
    _need(len(starts) > 0, "its allocation table is empty")
    _none(starts[found] != wanted, lambda at: f"sample {at} points to byte {wanted[at]}, where no stretch begins")
    _need(len(np.unique(wanted)) == len(wanted), "two of its samples point to the same bytes")
    length: NDArray[np.int64] = sizes[found].astype(np.int64)
    height, width = images["height"].astype(np.int64), images["width"].astype(np.int64)
    _none(mode > RAW, lambda at: f"sample {at} is of mode {mode[at]}, neither JPEG nor raw")
    _none(
        (height * width == 0) | ((mode == RAW) & (length != height * width * 3)),
        lambda at: f"sample {at} has {length[at]} bytes, which do not hold {width[at]}x{height[at]} pixels",
    )
    return length


def _checksums(
    file: BinaryIO, image: NDArray[Any], n: int, end: int, *tables: NDArray[Any]
) -> tuple[NDArray[np.uint32] | None, int]:
    """What our writer left, after its own check, and where the data before it end; None and `end` where another wrote
    the file."""
    sums = image["arguments"][: _SUMS.itemsize].copy().view(_SUMS)[0]
    if sums["mark"] != _MARK:
        return None, end
    file.seek(int(sums["pointer"]) if sums["pointer"] <= end else end)
    checksum = _records(file, np.dtype("<u4"), n, end, "its checksums")
    _need(_crc(*tables, checksum) == sums["tables"], "its tables do not match their checksum: damaged")
    return checksum, int(sums["pointer"])


def _crc(*tables: NDArray[Any]) -> int:
    crc = 0
    for table in tables:
        crc = zlib.crc32(table.tobytes(), crc)
    return crc


def page_for(largest: int) -> int:
    """The page size for samples of at most `largest` bytes: FFCV's own where they fit.

    Raises UserError where no page can hold them.
    """
    page = max(_USUAL_PAGE, 1 << (max(1, largest) - 1).bit_length())
    if page > _MOST_PAGE:
        raise UserError(f"an image may take {largest} bytes, more than a .beton's page can hold; shrink it: --max-side")
    return page


class Writer:
    """A .beton written in sample order, image and label, into an open file.

    samples  the most there will be.  page  bytes of a page; no sample is larger.
    """

    def __init__(self, file: BinaryIO, samples: int, page: int):
        self._file, self._page = file, page
        self._samples = np.zeros(samples, _SAMPLE)
        self._stretches = np.zeros(samples, _ALLOCATION)
        self._checksums = np.zeros(samples, "<u4")
        self._n = 0
        start = _HEADER.itemsize + 2 * _FIELD.itemsize + self._samples.nbytes
        self._end = -(-start // page) * page
        file.seek(self._end)

    @property
    def bytes_written(self) -> int:
        return self._end

    def add(self, data: bytes, mode: int, height: int, width: int, label: int) -> None:
        """Append one sample: a JPEG, or height * width * 3 bytes of RGB pixels."""
        if len(data) > self._page:
            raise ValueError(f"a sample of {len(data)} bytes in a page of {self._page}")
        if self._end // self._page != (self._end + len(data) - 1) // self._page:
            self._end = -(-self._end // self._page) * self._page
            self._file.seek(self._end)
        self._file.write(data)
        self._samples[self._n] = (mode, width, height, self._end), label
        self._stretches[self._n] = self._n, self._end, len(data)
        self._checksums[self._n] = zlib.crc32(data)
        self._n += 1
        self._end += len(data)

    def finish(self) -> None:
        """Write the tables; the header, without which nothing is read, last."""
        samples, stretches = self._samples[: self._n], self._stretches[: self._n]
        checksums = self._checksums[: self._n]
        fields = np.zeros(2, _FIELD)
        for at, (kind, name) in enumerate(((_IMAGE_FIELD, b"image"), (_INT_FIELD, b"label"))):
            fields[at]["type"] = kind
            fields[at]["name"][: len(name)] = list(name)
        sums = np.array([(_MARK, self._end, _crc(samples, stretches, checksums))], _SUMS)
        fields[0]["arguments"][: _SUMS.itemsize] = sums.view(np.uint8)
        table = self._end + checksums.nbytes
        self._file.write(checksums.tobytes() + stretches.tobytes())
        self._file.seek(_HEADER.itemsize)
        self._file.write(fields.tobytes() + samples.tobytes())
        self._file.seek(0)
        self._file.write(np.array([(_VERSION, 2, self._page, self._n, table)], _HEADER).tobytes())


def unchanged(path: bytes, offset: int, data: NDArray[np.uint8]) -> bool:
    """Whether a sample's bytes match the checksum its file keeps; true where none is kept."""
    kept = _kept_checksums(path) if path.endswith(b".beton") else {}
    return offset not in kept or zlib.crc32(data.data) == kept[offset]


@lru_cache(maxsize=1)
def _kept_checksums(path: bytes) -> dict[int, int]:
    table = read_table(path)
    if table.checksum is None:
        return {}
    return dict(zip(table.offset.tolist(), table.checksum.tolist(), strict=True))
