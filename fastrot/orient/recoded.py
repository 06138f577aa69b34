"""Images of lossless kinds turned: decoded, turned and encoded again, and refused where a pixel or a word would be lost."""

import io
import warnings
from typing import Any

from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from fastrot.data.images import TRANSPOSE
from fastrot.data.png import chunks, whole
from fastrot.orient.exif import Refused, in_xmp, riff_chunks, settled, tagged

_DEEP = {"1": 1, "I;16": 16}  # bits a sample of a mode, else 8
_TIFF_WRITTEN = frozenset(
    (254, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 317, 320, 322, 323, 324, 325, 338, 339)
)
_TIFF_KEPT = frozenset(
    (269, 270, 271, 272, 282, 283, 296, 305, 306, 315, 700, 33432, 34675)
)  # names, places, densities, XMP, ICC
_TIFF_LOSSLESS = frozenset(("raw", "packbits", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate", "group3", "group4"))


def turned(data: bytes, kind: str, orientation: int) -> bytes:
    """A PNG, WebP, TIFF, BMP or GIF made upright by `orientation` 2..8; its tag is 1. Raises Refused."""
    writers = {"PNG": _png, "WEBP": _webp, "TIFF": _tiff, "BMP": _bmp, "GIF": _gif}
    if kind not in writers:
        raise Refused("it is of a kind that cannot be written again without loss")
    stored = tagged(data, kind, 1) if kind == "TIFF" else data  # Pillow would turn it as it loads it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = _opened(stored)
            new = writers[kind](image, image.transpose(TRANSPOSE[orientation]), stored)
            same = _pixels(_opened(new)) == _pixels(image.transpose(TRANSPOSE[orientation]))
    except Refused:
        raise
    except Exception as error:  # Pillow's plugins raise any type
        raise Refused(f"Pillow cannot write it again ({type(error).__name__}: {error})") from None
    if not same:
        raise Refused("Pillow would not write the same pixels")
    return settled(new, kind, quarter=orientation >= 5) if kind in ("PNG", "WEBP") else new


def _opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    if getattr(image, "n_frames", 1) > 1:
        raise Refused("it holds several images")
    image.load()
    return image


def _pixels(image: Image.Image) -> tuple[str, tuple[int, int], bytes]:
    """All that is seen of an image."""
    shown = image.convert("RGBA") if image.mode == "P" or "transparency" in image.info else image
    return shown.mode, shown.size, shown.tobytes()


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _png(image: Image.Image, upright: Image.Image, data: bytes) -> bytes:
    """All chunks but those of the pixels are kept as they are, in their places."""
    new = _saved(upright, "PNG", bits=data[24])
    if data[25] != new[25] or (data[24] != new[24] and image.mode != "P"):
        raise Refused(f"Pillow cannot write PNGs of {data[24]} bits a sample of this kind")
    pixels = b"".join(whole(new, at) for name, at in chunks(new) if name == b"IDAT")
    out, end = [data[:8], whole(new, 8)], 8
    for name, at in chunks(data):
        chunk = whole(data, at)
        end = at + len(chunk)
        if name == b"IDAT":
            chunk, pixels = pixels, b""
        if name != b"IHDR":
            out.append(chunk)
    return b"".join([*out, data[end:]])


def _webp(image: Image.Image, upright: Image.Image, data: bytes) -> bytes:
    if all(name != b"VP8L" for name, _ in riff_chunks(data)):
        raise Refused("it is a WebP with loss, which another encoding would add to; --apply exif adds none")
    said = {key: image.info[key] for key in ("icc_profile", "exif", "xmp") if key in image.info}
    return _saved(upright, "WEBP", lossless=True, exact=True, quality=100, **said)


def _tiff(image: Image.Image, upright: Image.Image, data: bytes) -> bytes:
    assert isinstance(image, TiffImageFile)
    tags = dict(image.tag_v2)
    compression = image.info.get("compression", "raw")
    if compression not in _TIFF_LOSSLESS or set(tags.get(258, (1,))) != {_DEEP.get(image.mode, 8)}:
        raise Refused("Pillow cannot write such a TIFF without loss; --apply exif needs not to")
    lost = sorted(tags.keys() - _TIFF_WRITTEN - _TIFF_KEPT)
    if lost:
        raise Refused(f"its TIFF tag {lost[0]} would be lost; --apply exif keeps all")
    said = {tag: value for tag, value in tags.items() if tag in _TIFF_KEPT}
    if 700 in said:
        said[700] = in_xmp(said[700], 1)
    return _saved(upright, "TIFF", compression=compression, tiffinfo=said)


def _bmp(image: Image.Image, upright: Image.Image, data: bytes) -> bytes:
    return _saved(upright, "BMP", dpi=image.info.get("dpi", (0, 0)))


def _gif(image: Image.Image, upright: Image.Image, data: bytes) -> bytes:
    return _saved(upright, "GIF", optimize=False)
