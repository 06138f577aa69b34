"""JPEGs turned without loss: libjpeg-turbo moves the coefficients' blocks, no pixel is computed anew."""

import ctypes
import ctypes.util
import functools

from fastrot.data.jpeg import END, FRAMES, MARKER
from fastrot.errors import UserError
from fastrot.orient.exif import Refused, segments, settled

_OPERATIONS = {2: 1, 3: 6, 4: 2, 5: 3, 6: 5, 7: 4, 8: 7}  # of an orientation, turbojpeg.h's TJXOP
# orientations whose upright edge the stored far edge becomes
_LEFT, _TOP = frozenset((2, 3, 6, 7)), frozenset((3, 4, 7, 8))
_PERFECT, _TRIM, _PROGRESSIVE, _NO_MARKERS = 1, 2, 32, 64  # TJXOPT
_BLOCK = 8  # pixels
_PROGRESSIVE_FRAMES, _APP2 = frozenset((0xC2, 0xCA)), 0xE2


class _Transform(ctypes.Structure):
    """turbojpeg.h's tjtransform."""

    _fields_ = (
        ("region", ctypes.c_int * 4),
        ("operation", ctypes.c_int),
        ("options", ctypes.c_int),
        ("data", ctypes.c_void_p),
        ("filter", ctypes.c_void_p),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    """TurboJPEG's interface, the same in versions 2 and 3. Raises UserError where it is not installed."""
    name = ctypes.util.find_library("turbojpeg")
    try:
        library = ctypes.CDLL(name or "libturbojpeg.so.0")
    except OSError:
        raise UserError(
            "JPEGs are turned without loss by libturbojpeg, which is not installed (apt-get install libturbojpeg0); "
            "--apply exif needs it not"
        ) from None
    library.tjInitTransform.restype = ctypes.c_void_p
    library.tjGetErrorStr2.restype = ctypes.c_char_p
    library.tjGetErrorStr2.argtypes = library.tjDestroy.argtypes = library.tjFree.argtypes = [ctypes.c_void_p]
    library.tjTransform.argtypes = [
        ctypes.c_void_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_int, ctypes.POINTER(ctypes.c_void_p),
        ctypes.POINTER(ctypes.c_ulong), ctypes.POINTER(_Transform), ctypes.c_int,
    ]  # fmt: skip
    return library


def turned(data: bytes, orientation: int, trim: bool) -> bytes:
    """A JPEG made upright by `orientation` 2..8, with all that it says of itself; the tag is 1, a thumbnail is dropped.

    trim  cut off what is no whole block at an edge that would come to lie at the left or at the top.
    Raises Refused where that would be needed, or the JPEG is damaged.
    """
    progressive, left, top, size = _edges(data, orientation)
    if (left or top) and not trim:
        edges = [f"{n} pixels of its {edge} edge" for n, edge in ((left, "left"), (top, "top")) if n]
        raise Refused(f"{' and '.join(edges)} (once upright) would be trimmed; --trim does it")
    if left == size[0] or top == size[1]:
        raise Refused("it is smaller than a block")
    options = _NO_MARKERS | (_TRIM if trim else _PERFECT) | (_PROGRESSIVE if progressive else 0)
    whole = _spliced(data, _transformed(data, _OPERATIONS[orientation], options))
    return settled(whole, "JPEG", quarter=orientation >= 5)


def _edges(data: bytes, orientation: int) -> tuple[bool, int, int, tuple[int, int]]:
    """Whether it is progressive; pixels of the upright image's left and top edges that are no whole block; width and
    height of that image."""
    frame = next((one for one in segments(data) if one.marker in FRAMES), None)
    if frame is None:
        raise Refused("its JPEG header is broken")
    content = data[frame.inside]
    height, width, components = (int.from_bytes(content[i:j], "big") for i, j in ((1, 3), (3, 5), (5, 6)))
    factors = [divmod(factor, 16) for factor in content[7 : 6 + 3 * components : 3]]
    if len(factors) != components or not all(min(one) for one in factors) or not factors:
        raise Refused("its JPEG header is broken")
    across, down = (_BLOCK * max(one) if components > 1 else _BLOCK for one in zip(*factors, strict=True))
    if orientation >= 5:
        width, height, across, down = height, width, down, across
    left = width % across if orientation in _LEFT else 0
    top = height % down if orientation in _TOP else 0
    return frame.marker in _PROGRESSIVE_FRAMES, left, top, (width, height)


def _transformed(data: bytes, operation: int, options: int) -> bytes:
    library = _library()
    handle = library.tjInitTransform()
    if not handle:
        raise MemoryError("no memory to turn a JPEG")
    out, size = ctypes.c_void_p(), ctypes.c_ulong()
    transform = _Transform(operation=operation, options=options)
    try:
        if library.tjTransform(handle, data, len(data), 1, out, size, transform, 0):
            raise Refused(f"libjpeg-turbo: {library.tjGetErrorStr2(handle).decode(errors='replace')}")
        return ctypes.string_at(out.value or 0, size.value)
    finally:
        library.tjFree(out)
        library.tjDestroy(handle)


def _spliced(data: bytes, turned: bytes) -> bytes:
    """`turned` with the application segments and comments of `data`, as they are, and what stands behind its end."""
    said = [one for one in segments(data) if one.is_metadata]
    end = _end(data)
    if end < len(data) and any(one.marker == _APP2 and data[one.inside].startswith(b"MPF\0") for one in said):
        raise Refused("it holds further images (MPF), which would stay as they are; --apply exif turns all")
    kept = [turned[one.start : one.end] for one in segments(turned) if not one.is_metadata]
    *_, scan = segments(turned)
    return b"".join([data[:2], *(data[one.start : one.end] for one in said), *kept, turned[scan.end :], data[end:]])


def _end(data: bytes) -> int:
    """Where a JPEG ends, behind its end marker."""
    *_, scan = segments(data)
    at = scan.end
    while found := MARKER(data, at):
        at = found.end()
        if found[0] == END:
            return at
        at += int.from_bytes(data[at : at + 2], "big")
    return len(data)
