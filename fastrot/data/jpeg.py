"""A JPEG's frame header, its scans and its end, without a decoder."""

import os
import re
import struct
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

FRAMES = frozenset((*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)))
_SCAN, _APP0, _APP14 = 0xDA, 0xE0, 0xEE
END = b"\xff\xd9"
_ALONE = frozenset((0x01, *range(0xD0, 0xD9)))  # markers without a length
_SEQUENTIAL, _USUAL = (0xC0, 0xC1), (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive; Huffman
_SEGMENT = struct.Struct(">BBH").unpack_from  # 0xFF, marker, length from here on
_FRAME = struct.Struct(">BHHB").unpack_from  # bits, height, width, components
MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]").search  # one that is no part of a scan's coded bytes
_HEADS = (4096, 1 << 18, -1)  # bytes that hold nearly every header, all but a few, every
_TAIL = 1024  # the end marker is looked for in the last bytes
MOST_SCANS = 256  # as many as DALI decodes; more are an attack, since each goes through all coefficients


class Frame(NamedTuple):
    """As stored, before any turn: height, width, pixels; components; usual: 8 bits, Huffman-coded, gray or three
    colours, with nothing in its header that libjpeg warns of; data: where its first scan's coded bytes begin; one_scan:
    whether that scan is the only one."""

    height: int
    width: int
    components: int
    usual: bool
    data: int
    one_scan: bool


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
            if not found or after > end:
                return None
            return Frame(*found, usual and plain, after, sequential and view[at + 4] == found[2])
        if marker in FRAMES:
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


def frame_in(file: BinaryIO) -> Frame | None:
    """`frame_of` a file, of which no more is read than holds its header."""
    size = file.seek(0, os.SEEK_END)
    for some in _HEADS:
        file.seek(0)
        frame = frame_of(file.read(some))
        if frame or some >= size:
            return frame
    return None


def ends(file: BinaryIO, frame: Frame) -> bool:
    """Whether an end marker stands in a JPEG's last KiB, behind the header of its first scan: a thumbnail's does not
    count."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(frame.data, size - _TAIL))
    return END in file.read()


def too_many_scans(file: BinaryIO, frame: Frame) -> bool:
    """Whether a JPEG has more than MOST_SCANS. One that may have several is read whole."""
    if frame.one_scan:
        return False
    file.seek(0)
    data, at, scans = file.read(), frame.data, 1
    while (found := MARKER(data, at)) and found[0] != END and scans <= MOST_SCANS:
        at = found.start() + 2
        scans += data[at - 1] == _SCAN
        at += int.from_bytes(data[at : at + 2], "big")
    return scans > MOST_SCANS
