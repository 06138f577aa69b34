"""A folder of features on disk: one memory-mapped array a tap, a row for each image (in each of several passes).

feature1.npy ... feature5.npy, avg.npy   float32, float16 or bfloat16 [N, D]; numpy's files know no bfloat16 and hold
                                         it as two raw bytes, for .view(ml_dtypes.bfloat16)
labels.npy                               int64 [N], or int8 [N, classes] of 1, 0 and -1 (difficult)
manifest.json                            {"classes": [names], ...}
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fastrot.data import reading
from fastrot.errors import UserError
from fastrot.files import read_json

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {dtype.name: dtype for dtype in (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)}
_BESIDE = ("labels", "ids")  # arrays that are no features


@dataclass(frozen=True)
class FeatureStore:
    """features: tap -> [N, D] of one of DTYPES, mapped; labels as in the file; class names, or none."""

    folder: Path
    features: dict[str, NDArray[Any]]
    labels: NDArray[Any]
    classes: list[str]


@dataclass(frozen=True)
class _Facts:
    classes: list[str] = field(default_factory=list)


def open_store(folder: str | Path) -> FeatureStore:
    """Open a store without reading its features. Raises UserError where it is missing or does not fit together."""
    folder = Path(folder)
    if (folder / "plan.json").exists() and not (folder / "manifest.json").exists():
        raise UserError(f"{folder}: its features are not all there; run the same fastrot features again")
    if not (folder / "labels.npy").is_file():
        raise UserError(f"{folder}: no feature store: expected labels.npy and one array a tap, such as feature1.npy")
    labels = mapped(folder / "labels.npy")
    features: dict[str, NDArray[Any]] = {
        path.stem: mapped(path) for path in sorted(folder.glob("*.npy")) if path.stem not in _BESIDE
    }
    if not features:
        raise UserError(f"{folder}: no features beside labels.npy")
    for tap, x in features.items():
        if x.ndim != 2 or len(x) != len(labels) or x.dtype not in DTYPES.values():
            raise UserError(
                f"{folder / tap}.npy: expected {', '.join(DTYPES)} [{len(labels)}, D], found {x.dtype} {list(x.shape)}"
            )
    manifest = folder / "manifest.json"
    try:
        facts = read_json(manifest, _Facts) if manifest.exists() else _Facts()
    except ValueError as error:
        raise UserError(f"{manifest}: cannot be read ({error}); make the features again") from None
    return FeatureStore(folder, features, labels, facts.classes)


def mapped(path: Path) -> np.memmap[Any, np.dtype[Any]]:
    """The array of a store's file, mapped to read. Raises UserError where it is none."""
    try:
        array = reading.mapped(path)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    known: np.memmap[Any, np.dtype[Any]] = array.view(BFLOAT16) if array.dtype == np.dtype("V2") else array
    return known
