"""`fastrot finetune`: a whole network, from a pretrained backbone, learns classes from all or few of the images."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastrot.config import Config
from fastrot.data.manifest import Manifest
from fastrot.distributed import Ranks
from fastrot.engine import AUTOCAST
from fastrot.errors import UserError
from fastrot.probes.lowshot import draw
from fastrot.runs import transfer
from fastrot.runs.transfer import Learning, Start, TransferJob
from fastrot.tasks.finetune import FinetuneTask


class FinetuneJob(TransferJob):
    """A job that learns classes with every weight."""

    def __init__(self, begin: Start, config: Config, *parts: Any):
        self.head_rate = config.finetune.head_rate
        super().__init__(begin, config, *parts)

    def make_task(self) -> FinetuneTask:
        config, chosen = self.config, self.config.finetune
        self.say(self.begin.origin.says())
        if chosen.names is not None:
            self.say(f"learning from the {len(self.train):,} images that {chosen.names} names")
        elif chosen.fraction < 1:
            share = f"{100 * chosen.fraction:g}% of every class"
            self.say(f"learning from {len(self.train):,} images: {share}, drawn by seed {config.run.seed}")
        return FinetuneTask(
            self.begin.backbone,
            self.begin.classes,
            [255 * v for v in config.data.mean],
            [255 * v for v in config.data.std],
            AUTOCAST.get(config.engine.precision, torch.float32),
            self.ranks.device,
        )


def prepared(checkpoint: str | None, seed: int | None, config: Config, ranks: Ranks) -> Learning:
    """What the run begins from, what makes its job, and what chooses its images. Raises UserError.

    checkpoint  of the backbone, or None for the control drawn from `seed`.
    """
    begin = transfer.start("finetune", checkpoint, seed, config, ranks)
    return Learning(begin, partial(FinetuneJob, begin), begin.defining("finetune"), partial(subset, config=config))


def fine_tune(checkpoint: str | None, seed: int | None, config: Config, ranks: Ranks, resume: str) -> dict[str, Any]:
    """Train, or go on training, in run.out. Returns what --json prints. Raises UserError. Arguments as in `prepared`."""
    return prepared(checkpoint, seed, config, ranks).train(ranks, resume)


def subset(manifest: Manifest, config: Config) -> Manifest:
    """The images that a config's `finetune` chooses, in the manifest's order; all of them by default."""
    chosen = config.finetune
    if chosen.names is not None:
        return manifest.some(named_rows(manifest, Path(chosen.names)))
    if chosen.fraction < 1:
        return manifest.some(drawn_rows(np.asarray(manifest.label), chosen.fraction, config.run.seed))
    return manifest


def drawn_rows(labels: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.int64]:
    """Rows of a share of every class, ascending: round(fraction * its images), halves up, and at least one.

    labels  int64 [n].  Drawn as low-shot's positives are (sample 0), so a smaller share lies within a larger.
    """
    rows = np.argsort(labels, kind="stable")
    classes, first = np.unique(labels[rows], return_index=True)
    groups = np.split(rows, first[1:])
    drawn = [
        draw(seed, 0, 2 * int(label), of, max(1, int(fraction * len(of) + 0.5)))
        for label, of in zip(classes, groups, strict=True)
    ]
    return np.sort(np.concatenate(drawn))


def named_rows(manifest: Manifest, names: Path) -> NDArray[np.int64]:
    """Rows whose file a published list names, ascending; a line is the end of a path, `n01440764_10043.JPEG`.

    Raises UserError where the list cannot be read, or a name is of no row or of several.
    """
    try:
        lines = [line.split()[0] for line in names.read_bytes().splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"finetune.names {names}: {error.strerror}") from None
    wanted = {line.rpartition(b"/")[2]: b"/" + line for line in lines}
    found: dict[bytes, int] = {}
    for row in range(len(manifest)):
        path = manifest.path(row)
        line = wanted.get(path.rpartition(b"/")[2])
        if line is not None and path.endswith(line) and found.setdefault(line, row) != row:
            raise UserError(f"finetune.names {names}: {line[1:].decode()} names several images of {manifest.source}")
    missing = [line for line in wanted.values() if line not in found]
    if missing or not lines:
        first = f", the first: {missing[0][1:].decode()}" if missing else ""
        raise UserError(
            f"finetune.names {names}: {len(missing):,} of {len(lines):,} names are of no file of {manifest.source}{first}"
        )
    return np.array(sorted(found.values()), np.int64)
