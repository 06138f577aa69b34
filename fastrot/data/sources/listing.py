"""What a source lists, before any image is opened."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Listing:
    """Images in row order, each a stretch of bytes in a file.

    files    absolute paths as bytes (names need not be UTF-8).
    file     int64 [n] into files; offset int64 [n]; length int64 [n], -1 = the whole file.
    labels   int64 [n], -1 = none; or int8 [n, 20], multi-label: 1 present, 0 absent, -1 ignored.
    classes  names by label; empty where labels have no names.
    skipped  files or members passed over, counted by kind.
    faults   [path or member, reason] of what could not be listed.
    raw_shape  int [n, 2], height and width of rows that are pixels, 0 for images; None = all are images.
    """

    files: list[bytes]
    file: NDArray[np.int64]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    labels: NDArray[np.int64] | NDArray[np.int8]
    classes: list[str]
    skipped: Counter[str] = field(default_factory=Counter)
    faults: list[list[str]] = field(default_factory=list)
    raw_shape: NDArray[np.int32] | None = None


def whole_files(
    files: list[bytes],
    labels: list[int] | NDArray[np.int64] | NDArray[np.int8],
    classes: list[str],
    skipped: Counter[str] | None = None,
) -> Listing:
    """A listing of one image a file."""
    n = len(files)
    zeros = np.zeros(n, np.int64)
    known = labels if isinstance(labels, np.ndarray) else np.array(labels, np.int64)
    return Listing(files, np.arange(n), zeros, zeros - 1, known, classes, skipped or Counter())
