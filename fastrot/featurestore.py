"""A folder of features on disk: one memory-mapped array a tap, a row for each image (in each of several passes).

feature1.npy ... feature5.npy, avg.npy   float16 or float32 [N, D]
labels.npy                               int64 [N], or int8 [N, classes] of 1, 0 and -1 (difficult)
manifest.json                            {"classes": [names], ...}
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastrot.errors import UserError

_BESIDE = ("labels", "ids")  # arrays that are no features


@dataclass(frozen=True)
class FeatureStore:
    """features: tap -> float16 or float32 [N, D], mapped; labels as in the file; class names, or none."""

    folder: Path
    features: dict[str, NDArray]
    labels: NDArray
    classes: list[str]


def open_store(folder: str | Path) -> FeatureStore:
    """Open a store without reading its features. Raises UserError where it is missing or does not fit together."""
    folder = Path(folder)
    if (folder / "plan.json").exists() and not (folder / "manifest.json").exists():
        raise UserError(f"{folder}: its features are not all there; run the same fastrot features again")
    if not (folder / "labels.npy").is_file():
        raise UserError(f"{folder}: no feature store: expected labels.npy and one array a tap, such as feature1.npy")
    labels = _load(folder / "labels.npy")
    features = {path.stem: _load(path) for path in sorted(folder.glob("*.npy")) if path.stem not in _BESIDE}
    if not features:
        raise UserError(f"{folder}: no features beside labels.npy")
    for tap, x in features.items():
        if x.ndim != 2 or len(x) != len(labels) or x.dtype not in (np.float16, np.float32):
            raise UserError(
                f"{folder / tap}.npy: expected float16 or float32 [{len(labels)}, D], found {x.dtype} {list(x.shape)}"
            )
    manifest = folder / "manifest.json"
    try:
        classes = json.loads(manifest.read_text()).get("classes", []) if manifest.exists() else []
    except ValueError as error:
        raise UserError(f"{manifest}: not JSON ({error})") from None
    return FeatureStore(folder, features, labels, classes)


def _load(path: Path) -> NDArray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{path}: not a plain numpy array ({error})") from None
