"""vocseg:, cityscapes: and pairs: -- images and, beside each, a mask that says the class of every pixel.

vocseg:ROOT?split=train+aug      ImageSets/Segmentation/<split>.txt; masks SegmentationClass/<id>.png, of split aug
                                 SegmentationClassAug/<id>.png (SBD's, converted as mmsegmentation does).
cityscapes:ROOT?split=train      leftImg8bit/<split>/<city>/*; masks gtFine/<split>/<city>/*_gtFine_labelIds.png.
pairs:IMAGES,MASKS               any two folders; a mask has its image's path with the ending .png.
"""

import os
from collections import Counter
from pathlib import Path

from fastrot.data.sources.listing import Listing, whole_files
from fastrot.errors import UserError

VOC_CLASSES = 21
_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_LEFT, _FINE = "_leftImg8bit.png", "_gtFine_labelIds.png"
Pairs = list[tuple[Path, Path]]


def open_source(spec: str) -> Listing:
    """The images of a source of masks, in order; labels -1. Raises UserError where an image or a mask is not there."""
    pairs, skipped = pairs_of(spec)
    for number, what in enumerate(("image", "mask")):
        missing = [pair[number] for pair in pairs if not pair[number].is_file()]
        if missing:
            raise UserError(f"{spec}: no such {what} {missing[0]} ({len(missing)} missing in all)")
    return whole_files([os.fsencode(image) for image, _ in pairs], [-1] * len(pairs), [], skipped)


def pairs_of(spec: str) -> tuple[Pairs, Counter[str]]:
    """(image, mask) of each row, absolute, and what was passed over. Raises UserError."""
    prefix, _, rest = spec.partition(":")
    skipped: Counter[str] = Counter()
    if prefix == "pairs":
        pairs = _of_folders(spec, rest, skipped)
    else:
        root, option, split = rest.partition("?split=")
        if not option or not split:
            raise UserError(f"{spec}: expected {prefix}:ROOT?split=train")
        pairs = (_of_voc if prefix == "vocseg" else _of_cityscapes)(spec, Path(root).absolute(), split)
    if not pairs:
        raise UserError(f"{spec}: no image there")
    return pairs, skipped


def _of_voc(spec: str, name: Path, splits: str) -> Pairs:
    roots = [
        root for root in (name, name / "VOC2012", name / "VOCdevkit" / "VOC2012") if (root / "JPEGImages").is_dir()
    ]
    if not roots:
        raise UserError(f"{spec}: no JPEGImages there, nor in VOC2012 below it")
    root = roots[0]
    pairs: dict[str, Path] = {}
    for split in splits.split("+"):
        file = root / "ImageSets" / "Segmentation" / f"{split}.txt"
        try:
            ids = file.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}; name a split") from None
        masks = root / ("SegmentationClassAug" if split == "aug" else "SegmentationClass")
        for one in ids:
            if pairs.setdefault(one, masks / f"{one}.png") != masks / f"{one}.png":
                raise UserError(f"{spec}: image {one} is of split aug and of another; it has two masks")
    return [(root / "JPEGImages" / f"{one}.jpg", mask) for one, mask in pairs.items()]


def _of_cityscapes(spec: str, root: Path, split: str) -> Pairs:
    images = root / "leftImg8bit" / split
    if not images.is_dir():
        raise UserError(f"{spec}: no such folder {images}")
    pairs = []
    for image in sorted(images.glob(f"*/*{_LEFT}")):
        mask = root / "gtFine" / split / image.parent.name / image.name.replace(_LEFT, _FINE)
        pairs.append((image, mask))
    return pairs


def _of_folders(spec: str, rest: str, skipped: Counter[str]) -> Pairs:
    names = rest.split(",")
    if len(names) != 2:
        raise UserError(f"{spec}: expected pairs:IMAGES,MASKS")
    images, masks = (Path(name).absolute() for name in names)
    for folder in (images, masks):
        if not folder.is_dir():
            raise UserError(f"{spec}: no such folder {folder}")
    found: dict[Path, Path] = {}
    for image in sorted(images.rglob("*")):
        if image.suffix.lower() in _ENDINGS:
            mask = masks / image.relative_to(images).with_suffix(".png")
            if mask in found:
                raise UserError(f"{spec}: {found[mask].name} and {image.name} share the mask {mask}; rename one")
            found[mask] = image
        elif image.is_file():
            skipped["not an image"] += 1
    skipped["mask without an image"] = sum(one not in found for one in masks.rglob("*.png"))
    skipped += Counter()  # without those that are 0
    return [(image, mask) for mask, image in found.items()]
