"""The objects of a set's images: boxes, classes, masks, beside the rows of its manifest.

Sources: `voc:ROOT?split=S` (Annotations/*.xml) and `coco:FILE.json?images=DIR`. On disk: an array a column.
Source of the rules: mmdetection 2.x's XMLDataset and CocoDataset; protocol "Detection".
"""

import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle

from fastrot.data.coco_json import CocoObject, read_coco
from fastrot.data.manifest import Manifest
from fastrot.data.reading import mapped
from fastrot.data.sources import coco, parts_of, voc
from fastrot.errors import UserError
from fastrot.files import read_json

_COLUMNS = ("first", "box", "label", "aside", "area", "masks", "mask_ends", "image_id")


@dataclass(frozen=True)
class Objects:
    """Of N images, M objects; those of row r are first[r] .. first[r + 1] - 1.

    first int64 [N + 1]; box float32 [M, 4] (x1, y1, x2, y2), within the image; label int64 [M] into classes;
    aside bool [M], difficult (VOC) or a crowd (COCO): not learnt, neither right nor wrong when found;
    area float64 [M]; masks uint8, COCO's compressed RLEs end to end, mask_ends int64 [M]; both empty without masks.
    image_id int64 [N], category [classes]: COCO's own numbers.  left_out  objects, counted by reason.
    """

    first: NDArray[np.int64]
    box: NDArray[np.float32]
    label: NDArray[np.int64]
    aside: NDArray[np.bool_]
    area: NDArray[np.float64]
    masks: NDArray[np.uint8]
    mask_ends: NDArray[np.int64]
    image_id: NDArray[np.int64]
    classes: list[str]
    category: list[int]
    left_out: dict[str, int]

    def __len__(self) -> int:
        return len(self.first) - 1

    @property
    def has_masks(self) -> bool:
        return len(self.mask_ends) > 0

    def of(self, row: int) -> slice:
        """Where the objects of a row lie."""
        return slice(int(self.first[row]), int(self.first[row + 1]))

    def rle_of(self, one: int, height: int, width: int) -> dict[str, Any]:
        """An object's mask as COCO's compressed RLE."""
        start = int(self.mask_ends[one - 1]) if one else 0
        return {"size": [height, width], "counts": self.masks[start : int(self.mask_ends[one])].tobytes()}

    def content(self) -> str:
        """sha256 of all of it: what a resume compares."""
        sha = hashlib.sha256(json.dumps([self.classes, self.category]).encode())
        for name in _COLUMNS:
            sha.update(np.ascontiguousarray(getattr(self, name)).tobytes())
        return sha.hexdigest()

    def learnable(self) -> NDArray[np.int64]:
        """Rows with an object that is not set aside: the others teach nothing and are passed over."""
        rows = np.repeat(np.arange(len(self)), np.diff(self.first))
        return np.unique(rows[~self.aside])

    def some(self, rows: NDArray[np.int64]) -> "Objects":
        """Of these rows alone, ascending; masks stay where they are, by the objects' old numbers' ends."""
        keep = np.concatenate([np.arange(self.first[r], self.first[r + 1]) for r in rows] or [np.zeros(0, np.int64)])
        counts = self.first[rows + 1] - self.first[rows]
        masks, ends = self.masks, self.mask_ends
        if self.has_masks:
            starts = np.concatenate([[0], ends[:-1]])
            pieces = [masks[starts[one] : ends[one]] for one in keep]
            masks = np.concatenate(pieces or [np.zeros(0, np.uint8)])
            ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
        columns = {name: getattr(self, name)[keep] for name in ("box", "label", "aside", "area")}
        first = np.concatenate([[0], np.cumsum(counts)])
        return replace(self, **columns, first=first, masks=masks, mask_ends=ends, image_id=self.image_id[rows])

    @classmethod
    def none(cls, images: int) -> "Objects":
        """Of images of which nothing is known."""
        columns: dict[str, NDArray[Any]] = {
            "box": np.zeros((0, 4), np.float32),
            "label": np.zeros(0, np.int64),
            "aside": np.zeros(0, bool),
            "area": np.zeros(0),
            "masks": np.zeros(0, np.uint8),
            "mask_ends": np.zeros(0, np.int64),
        }
        first, ids = np.zeros(images + 1, np.int64), np.arange(images) + 1
        return cls(first=first, image_id=ids, classes=[], category=[], left_out={}, **columns)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in _COLUMNS:
            np.save(folder / f"{name}.npy", getattr(self, name), allow_pickle=False)
        names = {name: getattr(self, name) for name in ("classes", "category", "left_out")}
        (folder / "objects.json").write_text(json.dumps(names), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Objects":
        """Map what was saved. Raises UserError where it is missing or damaged."""
        try:
            arrays: dict[str, Any] = {name: mapped(folder / f"{name}.npy") for name in _COLUMNS}
            return cls(**arrays, **read_json(folder / "objects.json", dict[str, Any]))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{folder}: not objects that can be read ({error}); remove it") from None


@dataclass(frozen=True)
class _Found:
    """One object as its file has it: corners in pixels."""

    box: tuple[float, float, float, float]
    label: int
    aside: bool
    area: float | None
    mask: bytes | None


def read_objects(manifest: Manifest) -> Objects:
    """The objects of a manifest's rows. Raises UserError where its source has none, or an annotation is odd."""
    prefix, _, rest = manifest.source.partition(":")
    if prefix == "voc":  # joined ones too
        return _of_voc(manifest)
    if prefix == "coco" and len(parts_of(manifest.source)) > 1:
        raise UserError(f"{manifest.source}: COCO's files are not joined by +; merge them into one")
    if prefix == "coco":
        return _of_coco(manifest, *coco.split(rest))
    raise UserError(f"{manifest.source}: has no boxes; name voc:ROOT?split=S or coco:FILE.json?images=FOLDER")


def _of_voc(manifest: Manifest) -> Objects:
    found = []
    for row in range(len(manifest)):
        image = Path(os.fsdecode(manifest.path(row)))
        file = image.parent.parent / "Annotations" / f"{image.stem}.xml"
        found.append(_read_xml(file, int(manifest.height[row]), int(manifest.width[row])))
    ids = np.arange(len(manifest)) + 1
    return _gathered(manifest, found, ids, list(voc.CLASSES), list(range(1, len(voc.CLASSES) + 1)))


def _read_xml(file: Path, height: int, width: int) -> list[_Found]:
    try:
        root = ElementTree.parse(file).getroot()
        size = tuple(int(root.findtext(f"size/{side}", "-1")) for side in ("height", "width"))
        if size != (height, width) and size != (0, 0):  # some of VOC's files say 0
            raise UserError(f"{file}: is of an image of {size[1]}x{size[0]}, found {width}x{height}")
        return [_object_of(one) for one in root.iter("object")]
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; every image needs its annotation") from None
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # LookupError: of an encoding without a name
        raise UserError(f"{file}: not an annotation of VOC's ({error})") from None


def _object_of(one: ElementTree.Element) -> _Found:
    name = one.findtext("name", "")
    if name not in voc.CLASSES:
        raise ValueError(f"{name!r} is not one of VOC's 20 classes")
    corners = [float(one.findtext(f"bndbox/{corner}", "nan")) - 1 for corner in ("xmin", "ymin", "xmax", "ymax")]
    if not np.isfinite(corners).all():
        raise ValueError(f"{name}: its box is not four numbers")
    box = (corners[0], corners[1], corners[2], corners[3])  # pixels of VOC count from 1
    return _Found(box, voc.CLASSES.index(name), one.findtext("difficult", "0").strip() == "1", None, None)


def _of_coco(manifest: Manifest, file: Path, images: Path) -> Objects:
    content = read_coco(file)
    categories = [category.id for category in content.categories]
    labels = {number: label for label, number in enumerate(categories)}
    by_path = {os.fsencode(images.absolute() / image.file_name): image for image in content.images}
    of_image: dict[int, list[CocoObject]] = {}
    for one in content.annotations:
        of_image.setdefault(one.image_id, []).append(one)
    found, ids = [], []
    for row in range(len(manifest)):
        image = by_path[manifest.path(row)]
        if (image.height, image.width) != (manifest.height[row], manifest.width[row]):
            raise UserError(
                f"{file}: image {image.id} is listed as {image.width}x{image.height}, but {manifest.name(row)} is "
                f"{manifest.width[row]}x{manifest.height[row]} when upright; mend its entry"
            )
        ids.append(image.id)
        found.append([
            _Found(
                (one.bbox[0], one.bbox[1], one.bbox[0] + one.bbox[2], one.bbox[1] + one.bbox[3]),
                labels[one.category_id],
                bool(one.iscrowd),
                one.area,
                _mask_of(one, image.height, image.width, file),
            )
            for one in of_image.get(image.id, [])
        ])  # fmt: skip
    return _gathered(manifest, found, np.array(ids, np.int64), [c.name for c in content.categories], categories)


def _mask_of(one: CocoObject, height: int, width: int, file: Path) -> bytes | None:
    """Compressed RLE of an object's mask, or None where it has none. Raises UserError where it does not fit its image."""
    form, wrong = one.segmentation, ""
    if not form:
        return None
    if isinstance(form, list):
        if any(len(polygon) < 6 or len(polygon) % 2 for polygon in form):
            wrong = "has a polygon of fewer than three points, or half a point"
    elif list(form.get("size", [])) != [height, width]:
        wrong = f"is of {form.get('size')}, its image of {[height, width]}"
    elif not isinstance(form.get("counts"), list | str | bytes):
        wrong = "is neither polygons nor an RLE"
    elif isinstance(form["counts"], list) and sum(form["counts"]) != height * width:
        wrong = f"counts {sum(form['counts'])} pixels, its image has {height * width}"
    if wrong:
        raise UserError(f"{file}: the mask of annotation {one.id} {wrong}")
    if isinstance(form, list):
        return bytes(rle.merge(rle.frPyObjects(form, height, width))["counts"])
    counts = form["counts"]
    if isinstance(counts, list):
        return bytes(rle.frPyObjects(form, height, width)["counts"])
    return counts.encode() if isinstance(counts, str) else bytes(counts)


def _gathered(
    manifest: Manifest, found: list[list[_Found]], ids: NDArray[np.int64], classes: list[str], category: list[int]
) -> Objects:
    """One set of arrays; boxes are cut to their images, and those of which nothing is left are left out."""
    left_out: Counter[str] = Counter()
    kept: list[tuple[NDArray[np.float32], _Found]] = []
    counts, areas = [], []
    for row, some in enumerate(found):
        before = len(kept)
        for one in some:
            box = np.clip(one.box, 0, np.tile((manifest.width[row], manifest.height[row]), 2)).astype(np.float32)
            if one.box[2] < one.box[0] or one.box[3] < one.box[1]:
                left_out["box turned inside out"] += 1
            elif (box[2:] - box[:2]).min() < 1:
                left_out["box without a pixel in its image"] += 1
            else:
                left_out["box cut at its image's border"] += int((np.abs(box - one.box) > 0.5).any())
                area = one.area if one.area is not None else float((box[2:] - box[:2]).prod())
                kept.append((box, one))
                areas.append(area)
        counts.append(len(kept) - before)
    packed = [one.mask for _, one in kept if one.mask is not None]
    if 0 < len(packed) < len(kept):
        raise UserError(
            f"{manifest.source}: {len(kept) - len(packed)} of {len(kept)} objects have no mask; all or none"
        )
    return Objects(
        first=np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]),
        box=np.array([box for box, _ in kept], np.float32).reshape(-1, 4),
        label=np.array([one.label for _, one in kept], np.int64),
        aside=np.array([one.aside for _, one in kept], bool),
        area=np.array(areas, np.float64),
        masks=np.frombuffer(b"".join(packed), np.uint8),
        mask_ends=np.cumsum([len(one) for one in packed], dtype=np.int64),
        image_id=ids,
        classes=classes,
        category=category,
        left_out=dict(+left_out),
    )
