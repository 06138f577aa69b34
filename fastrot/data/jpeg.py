"""A JPEG's frame header, without a decoder."""

import struct
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_FRAMES = frozenset((*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)))
_SCAN, _APP1 = 0xDA, 0xE1
_ALONE = frozenset((0x01, *range(0xD0, 0xD9)))  # markers without a length
_USUAL = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive; Huffman
_SEGMENT = struct.Struct(">BBH").unpack_from  # 0xFF, marker, length from here on
_FRAME = struct.Struct(">BHHB").unpack_from  # bits, height, width, components


class Frame(NamedTuple):
    """As stored, before any turn: height, width, pixels; components; usual: 8 bits, Huffman-coded,
    gray or three colours; exif: whether there is an EXIF block."""

    height: int
    width: int
    components: int
    usual: bool
    exif: bool


def frame_of(data: bytes | NDArray[np.uint8]) -> Frame | None:
    """The frame of a JPEG by the markers before its first scan; None where they lead to none."""
    view, at, end, found, exif = memoryview(data), 2, len(data), None, False
    if bytes(view[:2]) != b"\xff\xd8":
        return None
    while at + 4 <= end:
        start, marker, length = _SEGMENT(view, at)
        if start != 0xFF:
            return None
        if marker == _SCAN:
            return found and Frame(*found, exif)
        if marker == 0xFF or marker in _ALONE:  # 0xFF fills
            at += 1 if marker == 0xFF else 2
            continue
        if marker in _FRAMES:
            if found or at + 10 > end:
                return None
            bits, height, width, components = _FRAME(view, at + 4)
            found = height, width, components, marker in _USUAL and bits == 8 and components in (1, 3)
        elif marker == _APP1:
            exif = exif or bytes(view[at + 4 : at + 10]) == b"Exif\0\0"
        at += 2 + length
    return None
