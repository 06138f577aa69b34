"""What a person may want to know of a manifest's rows before using them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastrot.data.manifest import Manifest
from fastrot.data.sources import MASKED

_SPLITS = frozenset(("train", "training", "val", "valid", "validation", "test", "testing"))


def describe(manifest: Manifest, say: Callable[[str], None]) -> None:
    """What an index left out, and what is odd about the rest: a line each kind."""
    if manifest.skipped:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(manifest.skipped.items()))
        say(f"{manifest.source}: passed over {kinds}")
    if manifest.quarantined:
        path, reason = manifest.quarantined[0]
        what = "are listed with what is wrong with them; what is no sound image is left out"
        say(f"{manifest.source}: {len(manifest.quarantined)} files {what}, the first: {path}: {reason}")
    for line in remarks(manifest):
        say(f"{manifest.source}: {line}")


def remarks(manifest: Manifest) -> list[str]:
    """What a person may not expect of these rows, a line each."""
    lines = []
    none = unlabelled(manifest)
    if manifest.source.partition(":")[0] in ("coco", "images", *MASKED):
        pass  # no labels are meant
    elif len(none) == len(manifest):
        lines.append("no image has a label; rotation needs none, so this trains")
    elif len(none):
        lines.append(
            f"{len(none):,} of {len(manifest):,} images have no label, the first: {manifest.name(int(none[0]))}"
        )
    if len(manifest.classes) == 1:
        lines.append(f"one class ({manifest.classes[0]}); rotation needs no labels, so this trains")
    splits = [name for name in manifest.classes if name.lower() in _SPLITS]
    if len(splits) > 1:
        example = Path(manifest.source) / splits[0]
        lines.append(
            f"its folders {', '.join(splits)} look like splits, and are all in here; name one, as in {example}"
        )
    return lines


def unlabelled(manifest: Manifest) -> NDArray[np.int64]:
    """Rows without a label, ascending; none where images have many."""
    return np.flatnonzero(manifest.label < 0) if manifest.label.ndim == 1 else np.zeros(0, np.int64)
