"""The orientation tag in a file's bytes: exchanged where it stands, put in where there is none; no other byte is lost.

Orientations are EXIF's: what is done to the stored pixels so that they are upright.
"""

import io
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from fastrot.data.images import open_image, orientation_of
from fastrot.data.png import chunks, whole
from fastrot.errors import BadImage

_ORIENTATION, _XMP, _DETAILS = 0x0112, 0x02BC, 0x8769
_SIDES = ((0x0100, 0x0101), (0x011A, 0x011B), (0xA002, 0xA003), (0xA20E, 0xA20F))  # of width and of height
_ENTRY = 12  # bytes: tag, type, count, value
_SHORT = 3
_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}
_EMPTY = b"MM\0*\0\0\0\x08" + bytes(6)  # a directory of no entries
_APP0, _APP1, _APP2, _COM, _SCAN = 0xE0, 0xE1, 0xE2, 0xFE, 0xDA
_EXIF, _XAP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_MOST = 0xFFFF - 2  # bytes of a JPEG's segment
_IN_XMP = re.compile(rb"(tiff:Orientation(?:\s*=\s*[\"']|>)\s*)[1-8]")
_QUARTERS = ((1, 6, 3, 8), (2, 7, 4, 5))  # each the one before, then a quarter turn clockwise


class Refused(Exception):
    """Why one file is left as it is, in a few words."""


def composed(orientation: int, clockwise: int) -> int:
    """The orientation of an image that is shown by `orientation` and then turned by `clockwise` degrees."""
    cycle = next(cycle for cycle in _QUARTERS if orientation in cycle)
    return cycle[(cycle.index(orientation) + clockwise // 90) % 4]


def orientation_in(data: bytes, kind: str) -> int:
    """1..8, by the data path's rule; a TIFF's own. Raises Refused where it is no image."""
    if kind == "TIFF":
        return Block(data).orientation
    try:
        return orientation_of(open_image(io.BytesIO(data)))
    except BadImage as error:
        raise Refused(str(error)) from None


def tagged(data: bytes, kind: str, orientation: int) -> bytes:
    """A file with its tag set; a thumbnail, which lies as the pixels do, keeps to it. Raises Refused."""

    def set_tag(block: bytes | None) -> bytes:
        edited = Block(block or _EMPTY)
        edited.turn_thumbnail(orientation)
        edited.orient(orientation)
        return bytes(edited.data)

    return _checked(_edited(data, kind, set_tag, orientation), kind, orientation)


def settled(data: bytes, kind: str, quarter: bool) -> bytes:
    """A file whose pixels have been turned upright: its tag says so, and its thumbnail, which would be wrong, is dropped.

    quarter  whether width and height changed places. Raises Refused.
    """
    return _checked(_edited(data, kind, lambda block: block and settled_block(block, quarter), 1), kind, 1)


def settled_block(block: bytes, quarter: bool) -> bytes:
    """`settled` of an EXIF block alone, as it stands in a JPEG's segment behind its name."""
    edited = Block(block)
    edited.drop_thumbnail()
    if quarter:
        edited.exchange_sides()
    edited.orient(1)
    return bytes(edited.data)


def _checked(data: bytes, kind: str, orientation: int) -> bytes:
    if orientation_in(data, kind) != orientation:
        raise Refused("its EXIF block cannot be written so that it is read again")
    return data


class Block:
    """Directories of TIFF: an EXIF block, or a TIFF file. Nothing in it changes its place, so all offsets stay true.

    Raises Refused where it is broken.
    """

    def __init__(self, data: bytes):
        self.data = bytearray(data)
        self._order = _ORDERS.get(data[:4], "")
        if not self._order:
            raise Refused("its EXIF block is broken")
        (self._first,) = self._read("I", 4)

    def _read(self, form: str, at: int) -> tuple[Any, ...]:
        try:
            return struct.unpack_from(self._order + form, self.data, at)
        except struct.error:
            raise Refused("its EXIF block is broken") from None

    def _write(self, form: str, at: int, *values: int) -> None:
        try:
            struct.pack_into(self._order + form, self.data, at, *values)
        except struct.error:  # a directory that the block's end cuts
            raise Refused("its EXIF block is broken") from None

    def _entries(self, directory: int) -> list[tuple[int, int]]:
        """(tag, where its entry begins) of a directory."""
        (n,) = self._read("H", directory)
        places = [directory + 2 + _ENTRY * i for i in range(n)]
        return [(*self._read("H10x", at), at) for at in places]

    def _after(self, directory: int) -> int:
        """Where a directory says where the next one begins."""
        (n,) = self._read("H", directory)
        return directory + 2 + _ENTRY * int(n)

    @property
    def orientation(self) -> int:
        values = [self._read("H", at + 8)[0] for tag, at in self._entries(self._first) if tag == _ORIENTATION]
        return values[-1] if values and values[-1] in range(1, 9) else 1

    @property
    def pages(self) -> int:
        """1, or 2 for several."""
        return 1 + bool(self._read("I", self._after(self._first))[0])

    def orient(self, orientation: int) -> None:
        """Exchange the tag's bytes; where there is none, write the first directory again at the end, with it."""
        if self._set(self._first, orientation):
            return
        entry = struct.pack(self._order + "HHIHH", _ORIENTATION, _SHORT, 1, orientation, 0)
        old = [bytes(self.data[at : at + _ENTRY]) for _, at in self._entries(self._first)]
        new = sorted([*old, entry], key=lambda entry: struct.unpack_from(self._order + "H", entry))
        (following,) = self._read("I", self._after(self._first))
        self.data += bytes(len(self.data) % 2)
        self._first = len(self.data)
        self._write("I", 4, self._first)
        self.data += struct.pack(self._order + "H", len(new)) + b"".join(new)
        self.data += struct.pack(self._order + "I", following)

    def _set(self, directory: int, orientation: int) -> bool:
        found = [at for tag, at in self._entries(directory) if tag == _ORIENTATION]
        for at in found:
            self._write("HIHH", at + 2, _SHORT, 1, orientation, 0)
        return bool(found)

    def turn_thumbnail(self, orientation: int) -> None:
        (thumbnail,) = self._read("I", self._after(self._first))
        if thumbnail:
            self._set(thumbnail, orientation)

    def drop_thumbnail(self) -> None:
        self._write("I", self._after(self._first), 0)

    def exchange_sides(self) -> None:
        """What is said of width is said of height, and the other way round."""
        places = dict(self._entries(self._first))
        if _DETAILS in places:
            places |= dict(self._entries(self._read("I", places[_DETAILS] + 8)[0]))
        for pair in _SIDES:
            if all(tag in places for tag in pair):
                one, other = (slice(places[tag] + 2, places[tag] + _ENTRY) for tag in pair)
                self.data[one], self.data[other] = self.data[other], self.data[one]

    def set_in_xmp(self, orientation: int) -> None:
        for tag, at in self._entries(self._first):
            if tag == _XMP:
                length, start = self._read("II", at + 4)
                part = slice(start, start + length)
                self.data[part] = in_xmp(bytes(self.data[part]), orientation)


def in_xmp(xmp: bytes, orientation: int) -> bytes:
    """XMP, of the same length; some programs believe its tag rather than EXIF's."""
    return _IN_XMP.sub(rb"\g<1>%d" % orientation, xmp)


_Edit = Callable[[bytes | None], bytes | None]  # of an EXIF block, None where there is none


def _edited(data: bytes, kind: str, edit: _Edit, orientation: int) -> bytes:
    editors = {"JPEG": _in_jpeg, "PNG": _in_png, "WEBP": _in_webp, "TIFF": _in_tiff}
    if kind not in editors:
        raise Refused(f"{kind if kind != 'other' else 'such a file'} has no place for an orientation tag")
    return editors[kind](data, edit, orientation)


class Segment(NamedTuple):
    """Of a JPEG's header: its marker, and data[start:end] with the marker; `inside` without marker and length."""

    marker: int
    start: int
    end: int

    @property
    def inside(self) -> slice:
        return slice(self.start + 4, self.end)

    @property
    def is_metadata(self) -> bool:
        return _APP0 <= self.marker <= 0xEF or self.marker == _COM


def segments(data: bytes) -> Iterator[Segment]:
    """A JPEG's, as far as its first scan's. Raises Refused where there is none."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a byte that fills
            at += 1
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        yield Segment(marker, at, end)
        if marker == _SCAN:
            return
        at = end
    raise Refused("its JPEG header is broken")


def _in_jpeg(data: bytes, edit: _Edit, orientation: int) -> bytes:
    header = list(segments(data))
    found = [one for one in header if one.marker == _APP1 and data[one.inside].startswith(_EXIF)]
    if len(found) > 1:
        raise Refused("its EXIF block is in several pieces")
    parts, at = [], 0
    for one in header:
        if one.marker == _APP1 and data[one.inside].startswith(_XAP):
            parts += [data[at : one.start + 4], in_xmp(data[one.inside], orientation)]
            at = one.end
        elif one in found:
            block = edit(data[one.inside][len(_EXIF) :])
            parts += [data[at : one.start], _app1(block)]
            at = one.end
    out = b"".join([*parts, data[at:]])
    if found or not (block := edit(None)):
        return out
    start = header[0].end if header[0].marker == _APP0 else 2
    return out[:start] + _app1(block) + out[start:]


def _app1(block: bytes | None) -> bytes:
    content = _EXIF + (block or b"")
    if len(content) > _MOST:
        raise Refused("its EXIF block is full")
    return struct.pack(">BBH", 0xFF, _APP1, len(content) + 2) + content


def _in_png(data: bytes, edit: _Edit, orientation: int) -> bytes:
    """eXIf goes before the pixels."""
    out, there = [data[:8]], any(name == b"eXIf" for name, _ in chunks(data))
    end = 8
    for name, at in chunks(data):
        chunk = whole(data, at)
        end, content = at + len(chunk), chunk[8:-4]
        if name == b"IDAT" and not there:
            if block := edit(None):
                out.append(png_chunk(b"eXIf", block))
            there = True
        if name == b"eXIf":
            out.append(png_chunk(name, edit(content) or b""))
        elif name == b"iTXt" and content.startswith(b"XML:com.adobe.xmp\0\0"):
            out.append(png_chunk(name, in_xmp(content, orientation)))
        else:
            out.append(chunk)
    return b"".join([*out, data[end:]])


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def riff_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(name, content) of each chunk of a WebP, in order."""
    at = 12
    while at + 8 <= len(data):
        name, length = struct.unpack_from("<4sI", data, at)
        yield name, data[at + 8 : at + 8 + length]
        at += 8 + length + length % 2


def _in_webp(data: bytes, edit: _Edit, orientation: int) -> bytes:
    """A file without EXIF would need another header first: it is refused where it would need one."""
    out, there = b"", False
    for name, content in riff_chunks(data):
        if name == b"EXIF":
            prefix = _EXIF if content.startswith(_EXIF) else b""
            content, there = prefix + (edit(content[len(prefix) :]) or b""), True
        elif name == b"XMP ":
            content = in_xmp(content, orientation)
        out += struct.pack("<4sI", name, len(content)) + content + bytes(len(content) % 2)
    if not there and edit(None):
        raise Refused("it is a WebP without an EXIF block")
    return struct.pack("<4sI4s", b"RIFF", len(out) + 4, b"WEBP") + out


def _in_tiff(data: bytes, edit: _Edit, orientation: int) -> bytes:
    block = Block(data)
    if block.pages > 1:
        raise Refused("it holds several pages")
    block.set_in_xmp(orientation)
    return edit(bytes(block.data)) or data
