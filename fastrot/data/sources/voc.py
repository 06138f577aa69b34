"""voc:ROOT?split=train -- Pascal VOC's image sets: twenty labels an image, read from ImageSets/Main."""

import codecs
import os
from collections import Counter

import numpy as np
from numpy.typing import NDArray

from fastrot.data.reading import GONE, exists, read_text_file, refusal, states
from fastrot.data.sources.listing import Listing, whole_files
from fastrot.errors import UserError

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse",
    "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
PRESENT, ABSENT, IGNORED = 1, 0, -1
_LABEL_OF = {b"1": PRESENT, b"-1": ABSENT, b"0": IGNORED}  # VOC's 0: only difficult objects
_SPLITS = ("train", "val", "trainval", "test")
_EXPECTED = "expected ROOT/JPEGImages and ROOT/ImageSets/Main/<class>_<split>.txt"


def open_source(rest: str) -> Listing:
    """Images by id; labels int8 [n, 20], 1 present, 0 absent, -1 ignored (difficult), over CLASSES.

    rest  ROOT?split=train|val|trainval|test; ROOT, or VOC2007 or VOC2012 below it, holds ImageSets and JPEGImages; the first
          of these.
    Raises UserError where a class list is missing, unknown or malformed, the lists disagree about the
    images, or an image is not there.
    """
    name, _, option = rest.partition("?split=")
    spec, root = f"voc:{rest}", _root(name)
    lists = os.path.join(root, "ImageSets", "Main")
    there = [s for s in _SPLITS if any(exists(os.path.join(lists, f"{c}_{s}.txt")) for c in CLASSES)]
    if option not in there:
        raise UserError(f"{spec}: no split {option!r}; name one that is there, as in ?split=train ({', '.join(there)})")
    ids, labels = _labels(lists, option)
    folder = os.path.join(os.fsencode(os.path.abspath(root)), b"JPEGImages")
    files = [os.path.join(folder, image + b".jpg") for image in ids]
    missing = np.flatnonzero(states(files)[:, 0] == GONE)
    if len(missing):
        first = os.fsdecode(files[missing[0]])
        raise UserError(f"{spec}: no such file {first}, which the class lists name ({len(missing)} missing in all)")
    return whole_files(files, labels, list(CLASSES), _passed_over(root, ids))


def _root(name: str) -> str:
    """`name`, or the folder of the year below it."""
    for folder in (
        name,
        *(os.path.join(name, kit, year) for year in ("VOC2007", "VOC2012") for kit in ("", "VOCdevkit")),
    ):
        if os.path.isdir(os.path.join(folder, "ImageSets", "Main")):
            return folder
    raise UserError(f"voc:{name}: no ImageSets/Main there, nor in VOC2007 or VOC2012 below it; {_EXPECTED}")


def _labels(lists: str, split: str) -> tuple[list[bytes], NDArray[np.int8]]:
    """Sorted ids, and their labels int8 [n, 20]. Every list must name the same images."""
    end = f"_{split}.txt"
    unknown = sorted({f.removesuffix(end) for f in os.listdir(lists) if f.endswith(end)} - set(CLASSES))
    if unknown:
        path = os.path.join(lists, unknown[0] + end)
        raise UserError(f"{path}: {unknown[0]!r} is not one of VOC's 20 classes; remove the file")
    columns = {name + end: _read(os.path.join(lists, name + end)) for name in CLASSES}
    named = {file: set(column) for file, column in columns.items()}
    if exists(os.path.join(lists, f"{split}.txt")):
        lines = _lines(os.path.join(lists, f"{split}.txt"))
        named = {f"{split}.txt": {line.split()[0] for line in lines if line.strip()}} | named
    (first, want), *others = named.items()
    for file, have in others:
        odd = sorted(want ^ have)
        if odd:
            lacks, has = (file, first) if odd[0] in want else (first, file)
            path, image = os.path.join(lists, lacks), os.fsdecode(odd[0])
            raise UserError(f"{path}: no entry of image {image}, which {has} has ({len(odd)} differ in all)")
    ids = sorted(want)
    return ids, np.array([[column[image] for column in columns.values()] for image in ids], np.int8)


def _lines(path: str) -> list[bytes]:
    try:
        return read_text_file(path).removeprefix(codecs.BOM_UTF8).splitlines()
    except FileNotFoundError as error:
        raise UserError(f"{path}: {error.strerror}; {_EXPECTED}") from None
    except OSError as error:
        raise refusal(f"{path}: cannot be read; {_EXPECTED}", error) from None


def _read(path: str) -> dict[bytes, int]:
    """One class list: id -> label."""
    found: dict[bytes, int] = {}
    for number, line in enumerate(_lines(path), 1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2 or words[1] not in _LABEL_OF:
            raise UserError(f"{path}: line {number}: {os.fsdecode(line)!r}; expected an image's id and 1, 0 or -1")
        if words[0] in found:
            raise UserError(f"{path}: line {number}: image {os.fsdecode(words[0])} stands there twice")
        found[words[0]] = _LABEL_OF[words[1]]
    if not found:
        raise UserError(f"{path}: is empty; expected an image's id and 1, 0 or -1 a line")
    return found


def _passed_over(root: str, ids: list[bytes]) -> Counter[str]:
    """Images outside the split, and annotations that are not there (labels need none)."""
    images, annotations = (
        {os.path.splitext(os.fsencode(name))[0] for name in os.listdir(folder)} if os.path.isdir(folder) else set()
        for folder in (os.path.join(root, "JPEGImages"), os.path.join(root, "Annotations"))
    )
    skipped = Counter({
        "image outside the split": len(images.difference(ids)),
        "missing XML (labels need none)": len(set(ids) - annotations),
    })  # fmt: skip
    return +skipped  # without those that are 0
