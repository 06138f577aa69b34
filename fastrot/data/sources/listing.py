"""What a source lists, before any image is opened."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Listing:
    """Files in row order.

    paths    absolute paths as bytes (names need not be UTF-8).
    labels   int64 [n]; -1 = none.
    classes  names by label; empty where labels have no names.
    skipped  files passed over, counted by kind.
    """

    paths: list[bytes]
    labels: NDArray[np.int64]
    classes: list[str]
    skipped: Counter = field(default_factory=Counter)
