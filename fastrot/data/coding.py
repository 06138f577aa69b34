"""How an image is coded: whether any decoder shows it as Pillow does, known from its header."""

import numpy as np
from numpy.typing import NDArray

from fastrot.data.jpeg import Frame, frame_of
from fastrot.data.png import chunks

# UNKNOWN in manifests of older formats. JPEG: of a usual coding; PLAIN: a PNG, WebP or BMP file without animation, 16 bits
# or alpha that hides colours; ODD: anything else, which is left to Pillow
UNKNOWN, ODD, PLAIN, JPEG = range(4)

_WEBP_SIMPLE = 0x20  # flags that an extended file may have: a colour profile, which nobody applies
_WEBP_ALPHA = 0x10  # in a lossless file's header


def coding_of(kind: str, data: bytes | NDArray[np.uint8]) -> int:
    """Of a file's bytes and its kind (of images.KINDS)."""
    if kind == "JPEG":
        return coding_of_jpeg(frame_of(data))
    return PLAIN if _plain(kind, data) else ODD


def coding_of_jpeg(frame: Frame | None) -> int:
    return JPEG if frame and frame.usual else ODD


def _plain(kind: str, data: bytes | NDArray[np.uint8]) -> bool:
    head = bytes(data[:34])
    if len(head) < 34:
        return False
    if kind == "PNG":
        return head[24] == 8 and _nothing_before_the_pixels(data)
    if kind == "WEBP":
        form = head[12:16]
        lossless = form == b"VP8L" and not head[24] & _WEBP_ALPHA
        return form == b"VP8 " or lossless or (form == b"VP8X" and not head[20] & ~_WEBP_SIMPLE)
    if kind == "BMP":  # a header of 40 bytes, rows from below, 24 bits, uncompressed
        return head[14:18] == b"\x28\0\0\0" and head[25] < 0x80 and head[28:34] == b"\x18\0\0\0\0\0"
    return False


def _nothing_before_the_pixels(data: bytes | NDArray[np.uint8]) -> bool:
    """Whether no chunk animates, or makes a colour transparent."""
    for name, _ in chunks(data):
        if name == b"IDAT":
            return True
        if name in (b"acTL", b"tRNS"):
            return False
    return False
