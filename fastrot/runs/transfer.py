"""What a backbone is trained on after pretraining, checked: the weights, the classes, the settings."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fastrot.config import Config, flat
from fastrot.data.build import open_manifest
from fastrot.data.manifest import Manifest
from fastrot.data.remarks import unlabelled
from fastrot.distributed import Ranks
from fastrot.errors import UserError
from fastrot.models.backbone import Origin, backbone_of
from fastrot.profiling.roofline import Row
from fastrot.runs.build import Job
from fastrot.runs.dry_run import dry_run
from fastrot.runs.run import Chooser, train

# switches of engine that pretraining alone has, and what leaves them out
_PRETRAINING = {"compile": False, "cuda_graphs": False, "norm": "torch", "stem_channels": 3, "recompute": False}


@dataclass(frozen=True)
class Start:
    """What a run begins from. backbone: in eval mode, frozen; config: with its architecture; classes: how many."""

    backbone: nn.Module
    origin: Origin
    config: Config
    classes: int

    def defining(self, section: str) -> dict[str, Any]:
        """What else a resume must find unchanged: a section of the config, and the weights."""
        weights = self.origin.sha256 or f"random, seed {self.origin.seed}"
        mine = {key: value for key, value in flat(self.config).items() if key.startswith(f"{section}.")}
        return mine | {"backbone": weights}


@dataclass(frozen=True)
class Learning:
    """A training from a backbone, ready to begin. make_job, more, choose: as in runs.run.train."""

    begin: Start
    make_job: Callable[..., Job]
    more: dict[str, Any]
    choose: Chooser | None = None

    def train(self, ranks: Ranks, resume: str) -> dict[str, Any]:
        """Train, or go on training, in run.out. Returns what --json prints. Raises UserError."""
        return train(self.begin.config, ranks, resume, [], None, self.make_job, self.more, self.choose)

    def dry_run(self, sources: dict[str, str], ranks: Ranks) -> dict[str, Any]:
        """Say what the training would be. sources: of each config value."""
        return dry_run(self.begin.config, sources, ranks, None, self.make_job, self.choose)


class TransferJob(Job):
    """A job that begins from a backbone."""

    def __init__(self, begin: Start, *parts: Any):
        self.begin = begin
        super().__init__(*parts)

    def step_rows(self, side: int) -> list[Row]:
        """None: the roof in the log is that of pretraining."""
        return []


def start(command: str, checkpoint: str | None, seed: int | None, config: Config, ranks: Ranks) -> Start:
    """What a run on labelled images begins from. Raises UserError. Arguments as in `begin`."""
    return begin(command, checkpoint, seed, config, lambda: _classes_of_images(config, ranks))


def begin(command: str, checkpoint: str | None, seed: int | None, config: Config, count: Callable[[], int]) -> Start:
    """Load the backbone of a checkpoint, or draw one from a seed. count() -> how many classes. Raises UserError."""
    for wrong, line in (
        (config.rotation.views != "one", "rotation.views must be one: an image is one view, and is not turned"),
        (config.rotation.shuffle_labels, "rotation.shuffle_labels is for pretraining"),
        (config.model.init is not None, "model.init is for pretraining; name --checkpoint"),
        *(
            (getattr(config.engine, key) != off, f"engine.{key} is for pretraining")
            for key, off in _PRETRAINING.items()
        ),
    ):
        if wrong:
            raise UserError(f"fastrot {command}: {line}")
    backbone, origin = backbone_of(checkpoint, seed, config.model.arch)
    classes = count()
    model = config.model.model_copy(update={"arch": origin.arch})
    return Start(backbone, origin, config.model_copy(update={"model": model}), classes)


def _classes_of_images(config: Config, ranks: Ranks) -> int:
    """How many classes the training images have. Raises UserError where labels or class names do not fit together."""
    train = open_manifest(config.data.train, config, ranks, "data.train")
    classes = int(_labels(train).max()) + 1
    if config.data.val:
        val = open_manifest(config.data.val, config, ranks, "data.val")
        largest = int(_labels(val).max())
        if largest >= classes:
            raise UserError(f"{val.source}: label {largest}, but the training images have classes 0 to {classes - 1}")
        if train.classes and val.classes and train.classes != val.classes:
            odd = sorted(set(train.classes) ^ set(val.classes))[:3]
            raise UserError(
                f"{val.source}: other classes than {train.source}, so labels do not mean the same: {', '.join(odd)}"
            )
    return classes


def _labels(manifest: Manifest) -> NDArray[np.int64]:
    """int64 [n], none negative. Raises UserError where an image has none, or many."""
    if manifest.label.ndim > 1:
        raise UserError(f"{manifest.source}: every image needs one class; fastrot svm is for many labels")
    none = unlabelled(manifest)
    if len(none):
        which = f"{len(none):,} of {len(manifest):,} have none, the first: {manifest.name(int(none[0]))}"
        raise UserError(f"{manifest.source}: every image needs one class; {which}")
    return manifest.label.astype(np.int64)
