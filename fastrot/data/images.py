"""What an image is, judged by Pillow; and the list of those that are not."""

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastrot.errors import BadImage

# Ours to enforce, from the header, before a pixel is allocated.
Image.MAX_IMAGE_PIXELS = None

# RAW: pixels, uint8 [height, width, 3], that need no decoding; their source says which rows are so
KINDS = ("other", "JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "RAW")
_ORIENTATION = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def kind_of(data: bytes | NDArray[np.uint8]) -> str:
    """An image's kind from its first bytes (its name may lie), one of KINDS."""
    head = bytes(data[:16])
    if head[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[:2] == b"BM":
        return "BMP"
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if head[:4] in (b"II*\0", b"MM\0*"):
        return "TIFF"
    return "other"


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation 1..8; 1 where there is none or the block is broken. XMP is ignored."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if image.format == "TIFF":
                found = image.tag_v2.get(_ORIENTATION, 1)
            else:
                exif = Image.Exif()
                exif.load(image.info.get("exif") or b"")
                found = exif.get(_ORIENTATION, 1)
    except (ValueError, TypeError, SyntaxError, OSError, KeyError, IndexError, AttributeError):
        return 1
    return found if found in range(1, 9) else 1


def open_image(source) -> Image.Image:
    """Pillow's image of a file object, header read, pixels not.

    Raises BadImage with the reason; OSError where the file cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(source)
    except Image.UnidentifiedImageError:
        raise BadImage("not an image that Pillow knows") from None
    except OSError as error:
        if error.errno is not None:  # the disk's, not the bytes'
            raise
        raise BadImage(f"broken header ({type(error).__name__}: {error})") from None
    except Exception as error:  # Pillow's plugins raise any type on broken headers
        raise BadImage(f"broken header ({type(error).__name__}: {error})") from None


def decode_upright(data: NDArray[np.uint8] | bytes) -> Image.Image:
    """The upright RGB image of a buffer, fully decoded: the oracle for what an image is.

    Raises BadImage with the reason.
    """
    image = open_image(io.BytesIO(bytes(data)))
    orientation = orientation_of(image)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if image.mode.startswith("I"):  # 16 bits: the high byte; convert("RGB") would clip to white
                high = np.asarray(image.convert("I"), np.int32) >> 8
                image = Image.fromarray(high.clip(0, 255).astype(np.uint8))
            image = image.convert("RGB")
    except Exception as error:  # as above: any type
        raise BadImage(f"cannot be decoded ({type(error).__name__}: {error})") from None
    return image.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else image
