"""Which PNG, WebP and BMP files have nothing that decoders differ in: animation, transparency, palettes, many bits."""

import struct

import numpy as np
from numpy.typing import NDArray

_PNG_GRAY, _PNG_RGB = 0, 2  # colour types
_WEBP_ANIMATED, _WEBP_ALPHA = 0x02, 0x10  # flags
_CHUNK = struct.Struct(">I4s").unpack_from


def plain(kind: str, data: NDArray[np.uint8]) -> bool:
    """Whether any decoder shows the file as Pillow does, by its kind (of images.KINDS) and its header."""
    head = bytes(data[:34])
    if kind == "PNG":
        return head[24:25] == b"\x08" and head[25:26] in (b"\x00", b"\x02") and _png_chunks_are_plain(data)
    if kind == "WEBP":
        return head[12:16] in (b"VP8 ", b"VP8L") or (head[12:16] == b"VP8X" and not head[20] & _WEBP_ANIMATED)
    if kind == "BMP":  # a header of 40 bytes, rows from below, 24 bits, uncompressed
        return head[14:18] == b"\x28\0\0\0" and head[25:26] < b"\x80" and head[28:34] == b"\x18\0\0\0\0\0"
    return False


def _png_chunks_are_plain(data: NDArray[np.uint8]) -> bool:
    """Whether none before the pixels animates, or makes a colour transparent."""
    view, at = memoryview(data), 8
    while at + 8 <= len(data):
        length, name = _CHUNK(view, at)
        if name in (b"acTL", b"tRNS"):
            return False
        if name == b"IDAT":
            return True
        at += length + 12
    return False
