"""Which PNG, WebP and BMP files have nothing that decoders differ in: animation, 16 bits, alpha that hides colours."""

import numpy as np
from numpy.typing import NDArray

from fastrot.data.png import chunks

_WEBP_SIMPLE = 0x20  # flags that an extended file may have: a colour profile, which nobody applies
_WEBP_ALPHA = 0x10  # in a lossless file's header


def plain(kind: str, data: NDArray[np.uint8]) -> bool:
    """Whether any decoder shows the file as Pillow does, by its kind (of images.KINDS) and its header."""
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


def _nothing_before_the_pixels(data: NDArray[np.uint8]) -> bool:
    """Whether no chunk animates, or makes a colour transparent."""
    for name, _ in chunks(data):
        if name == b"IDAT":
            return True
        if name in (b"acTL", b"tRNS"):
            return False
    return False
