"""Predictions of a suite's detectors and segmenters beside the truth, as pictures."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastrot.data.bad_images import BadImages
from fastrot.data.build import open_manifest
from fastrot.data.manifest import Manifest
from fastrot.data.masks import read_masks
from fastrot.data.objects import Objects, read_objects
from fastrot.distributed import Ranks
from fastrot.report.drawn import drawn
from fastrot.report.pictures import Picture
from fastrot.runs.predict import open_trained, predictions, sure
from fastrot.tasks.detect import Found

_SHOWN = 6
_LEAST = 0.5  # score of the objects that are drawn


@dataclass(frozen=True)
class Predicted:
    """columns: the truth, then a backbone each; rows: of an image, a picture a column."""

    title: str
    columns: list[str]
    rows: list[list[Picture]]


def beside_truth(title: str, source: str, runs: dict[str, Path], ranks: Ranks) -> Predicted:
    """Some images of the source, evenly spread: as they are marked, and as each run's newest checkpoint sees them.

    runs  name -> run folder.
    """
    rows: dict[int, list[Picture]] = {}
    for name, folder in runs.items():
        trained = open_trained(
            str(folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip()), ranks
        )
        every = open_manifest(source, trained.config, ranks, title)
        some = every.some(np.unique(np.linspace(0, len(every) - 1, min(len(every), _SHOWN)).round().astype(np.int64)))
        classes = [name for _, name in trained.classes]
        objects = read_objects(some) if trained.detects else None
        for row, shown, found in predictions(trained, some, BadImages(None, source, len(some)), ranks):
            if row not in rows:
                image = os.fsencode(os.path.basename(some.path(row))).decode("utf-8", "backslashreplace")
                truth = _true(objects, some, row) if objects else read_masks(some, len(classes))(row)
                rows[row] = [Picture(drawn(shown, truth, classes), image)]
            found = sure(found, _LEAST) if isinstance(found, Found) else found
            rows[row].append(Picture(drawn(shown, found, classes), name))
    return Predicted(title, ["truth", *runs], list(rows.values()))


def _true(objects: Objects, manifest: Manifest, row: int) -> Found:
    """What is marked in an image, as if it were found."""
    at = objects.of(row)
    size = int(manifest.height[row]), int(manifest.width[row])
    masks = [objects.rle_of(one, *size) for one in range(at.start, at.stop)] if objects.has_masks else []
    count = at.stop - at.start
    return Found(row, np.array(objects.box[at]), np.ones(count, np.float32), np.array(objects.label[at]), masks)
