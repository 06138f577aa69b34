"""What an image is, judged by Pillow."""

import io
import warnings
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from fastrot.errors import BadImage

# Ours to enforce, from the header, before a pixel is allocated.
Image.MAX_IMAGE_PIXELS = None

# RAW: pixels, uint8 [height, width, 3], that need no decoding; their source says which rows are so
KINDS = ("other", "JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "RAW")
UNKNOWN = 0  # an orientation that manifests of older formats do not hold
_ORIENTATION = 0x0112
# of an orientation: what is done to stored pixels
TRANSPOSE = {
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
    """EXIF orientation 1..8 of the pixels that `image` holds, by the rule of Pillow's `exif_transpose` with XMP ignored.

    1 where there is none, or the block is broken; for a TIFF, which Pillow turns as it loads it.
    """
    if image.format == "TIFF":
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if image.format == "PNG":  # what describes it may stand behind its pixels
                image.load()
            _forget_xmp(image)
            found = image.getexif().get(_ORIENTATION, 1)
            return int(found) if found in range(1, 9) else 1
    except Exception:  # Pillow raises any type on broken blocks
        return 1


def _forget_xmp(image: Image.Image) -> None:
    for key in ("xmp", "XML:com.adobe.xmp"):
        image.info.pop(key, None)


def open_image(source: BinaryIO) -> Image.Image:
    """Pillow's image of a file object, header read, pixels not.

    Raises BadImage with the reason; OSError where the file cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(source)
    except UnidentifiedImageError:
        raise BadImage("not an image that Pillow knows") from None
    except OSError as error:
        if error.errno is not None:  # the disk's, not the bytes'
            raise
        raise BadImage(f"broken header ({type(error).__name__}: {error})") from None
    except Exception as error:  # Pillow's plugins raise any type on broken headers
        raise BadImage(f"broken header ({type(error).__name__}: {error})") from None
    _forget_xmp(image)  # before a TIFF is loaded
    return image


def known(orientation: int, buffer: NDArray[np.uint8]) -> int:
    """A manifest's orientation of a file [length] or of pixels [H, W, 3]; where it is UNKNOWN, what the bytes say now:
    1 where they are no image, as decoding will tell."""
    if orientation != UNKNOWN:
        return orientation
    try:
        return 1 if buffer.ndim == 3 else orientation_of(open_image(io.BytesIO(buffer)))
    except BadImage:
        return 1


def decode_upright(data: NDArray[np.uint8] | bytes, orientation: int = UNKNOWN) -> Image.Image:
    """The upright RGB image of a buffer, fully decoded: the oracle for what an image is.

    orientation  of the stored pixels, as a manifest holds it; UNKNOWN: as `orientation_of` reads it.
    Raises BadImage with the reason.
    """
    image = open_image(io.BytesIO(bytes(data)))
    return upright(image, orientation or orientation_of(image))


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """An opened image decoded, as RGB, and turned. Raises BadImage with the reason.

    Of 16 bits a sample the high byte is shown; 32-bit integers and floats as Pillow shows them, clipped to 0..255.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
                high = np.asarray(image.convert("I"), np.int32) >> 8  # convert("RGB") would clip to white
                image = Image.fromarray(high.clip(0, 255).astype(np.uint8))
            image = image.convert("RGB")
    except Exception as error:  # as above: any type
        raise BadImage(f"cannot be decoded ({type(error).__name__}: {error})") from None
    return image.transpose(TRANSPOSE[orientation]) if orientation in TRANSPOSE else image


def boxed(image: Image.Image, box: NDArray[np.float64], size: int) -> NDArray[np.uint8]:
    """uint8 [size, size, 3] of a box (top, left, height, width) of an upright image, whose taps may lie outside it."""
    top, left, height, width = box.tolist()
    right, bottom = min(left + width, image.width), min(top + height, image.height)
    return np.array(image.resize((size, size), Image.Resampling.BILINEAR, (max(left, 0), max(top, 0), right, bottom)))
