"""Predictions of a suite's detectors and segmenters beside the truth, as pictures."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastrot.data.bad_images import BadImages
from fastrot.data.build import open_manifest
from fastrot.data.manifest import Manifest
from fastrot.data.masks import read_masks
from fastrot.data.objects import read_objects
from fastrot.distributed import Ranks
from fastrot.files import as_words
from fastrot.report.drawn import drawn, legend
from fastrot.report.pictures import Picture
from fastrot.runs.predict import Mask, open_trained, predictions, sure
from fastrot.tasks.detect import Found

_SHOWN = 6
_LEAST = 0.5  # score of the objects that are drawn


@dataclass(frozen=True)
class Predicted:
    """columns: the truth, then a backbone each; rows: of an image, a picture a column; colours: of classes of pixels."""

    title: str
    columns: list[str]
    rows: list[list[Picture]]
    colours: list[tuple[str, str]]


def beside_truth(title: str, source: str, runs: dict[str, Path], ranks: Ranks) -> Predicted:
    """Some images of the source, evenly spread: as they are marked, and as each run's newest checkpoint sees them.

    runs  name -> run folder.
    """
    rows: dict[int, list[Picture]] = {}
    there: set[int] = set()
    for name, folder in runs.items():
        newest = (folder / "checkpoints" / "latest").read_text().strip()
        trained = open_trained(str(folder / "checkpoints" / newest), ranks)
        every, classes = open_manifest(source, trained.config, ranks, title), [one for _, one in trained.classes]
        some = every.some(np.unique(np.linspace(0, len(every) - 1, min(len(every), _SHOWN)).round().astype(np.int64)))
        true = _truth(some, len(classes), trained.detects)
        for row, shown, found in predictions(trained, some, BadImages(None, source, len(some)), ranks):
            image = as_words(os.path.basename(some.path(row)))
            seen = sure(found, _LEAST) if isinstance(found, Found) else found
            there |= {
                int(label) for one in (true(row), seen) if isinstance(one, np.ndarray) for label in np.unique(one)
            }
            mine = rows.setdefault(row, [Picture(drawn(shown, true(row), classes), image)])
            mine.append(Picture(drawn(shown, seen, classes), name))
    return Predicted(title, ["truth", *runs], list(rows.values()), legend(there, classes))


def _truth(manifest: Manifest, classes: int, detects: bool) -> Callable[[int], Found | Mask]:
    """Row -> what is marked in its image, as if it were found."""
    if not detects:
        return read_masks(manifest, classes)
    objects = read_objects(manifest)

    def of(row: int) -> Found:
        at, size = objects.of(row), (int(manifest.height[row]), int(manifest.width[row]))
        masks = [objects.rle_of(one, *size) for one in range(at.start, at.stop)] if objects.has_masks else []
        ones = np.ones(at.stop - at.start, np.float32)
        return Found(row, np.array(objects.box[at]), ones, np.array(objects.label[at]), masks)

    return of
