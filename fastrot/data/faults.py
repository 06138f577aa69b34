"""What an image is, judged by Pillow; and the list of those that are not."""

import io
import json
import threading
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastrot.errors import BadImage, Fault

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

    Raises BadImage with the reason.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(source)
    except Image.UnidentifiedImageError:
        raise BadImage("not an image that Pillow knows") from None
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


class BadImages:
    """bad_images.jsonl: every image replaced while running, once over all ranks and resumes.

    path    the file, shared by the ranks; None keeps the list in memory.
    source  the data set; most counts its images alone, and a longer list stops the run.
    """

    def __init__(self, path: Path | None, source: str, most: int):
        self._path, self._source, self._most = path, source, most
        self._known: set[str] = set()
        self._lock = threading.Lock()

    def add(self, name: str, row: int, reason: str) -> None:
        """List one image by its place. Raises Fault when there are more than data.max_bad."""
        with self._lock:
            if name in self._known:
                return
            self._read_what_other_ranks_found()
            if name not in self._known:
                self._known.add(name)
                if self._path is not None:
                    with self._path.open("a", encoding="utf-8") as file:
                        file.write(
                            json.dumps({"path": name, "source": self._source, "row": row, "reason": reason}) + "\n"
                        )
        if len(self._known) > self._most:
            raise Fault(
                f"{len(self._known)} unreadable images, more than data.max_bad {self._most}; the last: "
                f"{name}: {reason}" + (f"; all are in {self._path}" if self._path else "")
            )

    def _read_what_other_ranks_found(self) -> None:
        if self._path is not None and self._path.exists():
            lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
            entries = [json.loads(line) for line in lines if line.endswith("\n")]
            self._known |= {entry["path"] for entry in entries if entry["source"] == self._source}
