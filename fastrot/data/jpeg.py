"""A JPEG's frame header and its end, without a decoder."""

import os
import struct
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

_FRAMES = frozenset((*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)))
_SCAN, _APP0, _APP14 = 0xDA, 0xE0, 0xEE
_ALONE = frozenset((0x01, *range(0xD0, 0xD9)))  # markers without a length
_SEQUENTIAL, _USUAL = (0xC0, 0xC1), (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive; Huffman
_SEGMENT = struct.Struct(">BBH").unpack_from  # 0xFF, marker, length from here on
_FRAME = struct.Struct(">BHHB").unpack_from  # bits, height, width, components
_HEADS = (4096, 1 << 18)  # bytes that hold nearly every header, and all but a few
_TAIL = 1024  # the end marker is looked for in the last bytes


class Frame(NamedTuple):
    """As stored, before any turn: height, width, pixels; components; usual: 8 bits, Huffman-coded, gray or three
    colours, with nothing in its header that libjpeg warns of; data: where its first scan's coded bytes begin."""

    height: int
    width: int
    components: int
    usual: bool
    data: int


def frame_of(data: bytes | NDArray[np.uint8]) -> Frame | None:
    """The frame of a JPEG by the markers before its first scan; None where they lead to none."""
    view, at, end = memoryview(data), 2, len(data)
    found: tuple[int, int, int] | None = None
    usual, sequential = True, False
    if bytes(view[:2]) != b"\xff\xd8":
        return None
    while at + 4 <= end:
        start, marker, length = _SEGMENT(view, at)
        if start != 0xFF:
            return None
        if marker == 0xFF or marker in _ALONE:  # 0xFF fills
            at += 1 if marker == 0xFF else 2
            continue
        after = at + 2 + length
        if marker == _SCAN:
            plain = not sequential or bytes(view[after - 3 : after]) == b"\x00\x3f\x00"
            return Frame(*found, usual and plain, after) if found else None
        if marker in _FRAMES:
            if found or at + 10 > end:
                return None
            bits, height, width, components = _FRAME(view, at + 4)
            found, sequential = (height, width, components), marker in _SEQUENTIAL
            usual = usual and marker in _USUAL and bits == 8 and components in (1, 3)
        elif marker in (_APP0, _APP14):
            usual = usual and not _odd(bytes(view[at + 4 : after]))
        at = after
    return None


def _odd(application: bytes) -> bool:
    """Whether libjpeg warns of a JFIF or Adobe segment: a revision or a colour transform that it does not know."""
    if len(application) < 12:
        return False
    jfif = application[:5] == b"JFIF\0" and application[5] != 1
    return jfif or (application[:5] == b"Adobe" and application[11] > 1)


def ends(file: BinaryIO) -> bool:
    """Whether an end marker stands in a JPEG's last KiB, behind the header of its first scan: a thumbnail's does not
    count. False where only decoding tells."""
    size = file.seek(0, os.SEEK_END)
    for some in _HEADS:
        file.seek(0)
        if frame := frame_of(file.read(some)):
            file.seek(max(frame.data, size - _TAIL))
            return b"\xff\xd9" in file.read()
        if some >= size:
            break
    return False
