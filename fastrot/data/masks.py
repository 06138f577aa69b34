"""The class of each pixel of a set's images: mask files beside the rows of its manifest, read when asked for."""

import hashlib
import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from fastrot.data.manifest import Manifest
from fastrot.data.sources import MASKED, parts_of, segmentation, voc
from fastrot.errors import UserError

IGNORED = 255
# VOC's colours of the classes, uint8 [256, 3]: the bits of a number, dealt to red, green and blue
PALETTE = np.array(
    [[sum(((n >> (3 * k + c)) & 1) << (7 - k) for k in range(3)) for c in range(3)] for n in range(256)], np.uint8
)
# Cityscapes' 19 classes that are judged, in the order of their train ids, and their ids; its labels.py
_CITYSCAPES_NAMES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain", "sky",
    "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
_CITYSCAPES = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


@dataclass(frozen=True)
class Masks:
    """Called with a row: the class of each pixel, uint8 [height, width], upright; 255: none.

    files  of the rows; sizes int32 [N, 2], height and width that a mask must have.
    table  uint8 [256], classes by the values in the files.
    """

    files: list[Path]
    sizes: NDArray[np.int32]
    table: NDArray[np.uint8]
    classes: int

    def __len__(self) -> int:
        return len(self.files)

    def __call__(self, row: int) -> NDArray[np.uint8]:
        """Raises UserError where a mask cannot be read, is of another size than its image, or names another class."""
        file = self.files[row]
        data = _read(file)
        try:
            values = np.asarray(ImageOps.exif_transpose(_opened(file, data)))
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{file}: is damaged ({error})") from None
        if values.shape != tuple(self.sizes[row].tolist()):
            raise _misfit(file, values.shape, self.sizes[row])
        known = self.table[values] if values.max(initial=0) <= 255 else values
        odd = known[(known >= self.classes) & (known != IGNORED)]
        if len(odd):
            raise UserError(
                f"{file}: holds class {odd.max()}; segment.classes {self.classes} allows 0 to {self.classes - 1}, and 255 "
                "for none"
            )
        return np.ascontiguousarray(known.astype(np.uint8))

    def content(self) -> str:
        """sha256 of all files: what a resume compares. Raises UserError where a mask is of another size than its image."""
        sha = hashlib.sha256(self.table.tobytes())
        for file, size in zip(self.files, self.sizes, strict=True):
            data = _read(file)
            stored = _opened(file, data).size[::-1]  # how it lies is told when it is decoded
            if sorted(stored) != sorted(size.tolist()):
                raise _misfit(file, stored, size)
            sha.update(hashlib.sha256(data).digest())
        return sha.hexdigest()

    def some(self, rows: NDArray[np.int64]) -> "Masks":
        """Of these rows alone."""
        return Masks([self.files[row] for row in rows.tolist()], self.sizes[rows], self.table, self.classes)


def read_masks(manifest: Manifest, classes: int) -> Masks:
    """The masks of a manifest's rows. Raises UserError where its source has none."""
    parts = parts_of(manifest.source)
    prefixes = {part.partition(":")[0] for part in parts}
    if not prefixes <= set(MASKED):
        raise UserError(
            f"{manifest.source}: has no masks; name vocseg:ROOT?split=S, cityscapes:ROOT?split=S or pairs:IMAGES,MASKS"
        )
    if "cityscapes" in prefixes and (len(prefixes) > 1 or classes != len(_CITYSCAPES)):
        raise UserError(
            f"{manifest.source}: Cityscapes has {len(_CITYSCAPES)} classes of its own; segment.classes is {classes}"
        )
    mask_of = {os.fsencode(image): mask for part in parts for image, mask in segmentation.pairs_of(part)[0]}
    files = [mask_of[manifest.path(row)] for row in range(len(manifest))]
    sizes = np.stack([manifest.height, manifest.width], 1)
    table = np.arange(256, dtype=np.uint8)
    if "cityscapes" in prefixes:
        table = np.full(256, IGNORED, np.uint8)
        table[list(_CITYSCAPES)] = np.arange(len(_CITYSCAPES))
    return Masks(files, sizes, table, classes)


def names_of(source: str, classes: int) -> list[str]:
    """The classes of a source of masks by name; numbers where it has none."""
    prefix = source.partition(":")[0]
    if prefix == "cityscapes":
        return list(_CITYSCAPES_NAMES)
    if prefix == "vocseg" and classes == segmentation.VOC_CLASSES:
        return ["background", *voc.CLASSES]
    return [f"class {number}" for number in range(classes)]


def _read(file: Path) -> bytes:
    """Raises UserError where it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None


def _opened(file: Path, data: bytes) -> Image.Image:
    """A mask, its header read. Raises UserError."""
    try:
        image = Image.open(io.BytesIO(data))
    except (OSError, SyntaxError) as error:
        what = "no image that Pillow knows" if isinstance(error, UnidentifiedImageError) else str(error)
        raise UserError(f"{file}: is no mask that can be read ({what})") from None
    if len(image.getbands()) > 1:
        raise UserError(f"{file}: has colours ({image.mode}); a mask has one channel, the number of each pixel's class")
    return image


def _misfit(file: Path, found: tuple[int, ...], wanted: NDArray[np.int32]) -> UserError:
    return UserError(
        f"{file}: is {found[1]}x{found[0]}, its image {wanted[1]}x{wanted[0]} when upright; a mask lies on its image as it "
        "is seen"
    )
