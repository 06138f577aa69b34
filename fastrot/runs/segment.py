"""`fastrot segment`: a segmenter on a pretrained backbone learns the class of each pixel, in a run folder like any other."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fastrot import distributed
from fastrot.config import Config
from fastrot.data.build import open_manifest
from fastrot.data.masks import Masks, read_masks
from fastrot.data.whole_masks import MaskView, ShownMask
from fastrot.distributed import Ranks
from fastrot.runs import transfer
from fastrot.runs.transfer import Learning
from fastrot.runs.whole import Beside, WholeJob
from fastrot.tasks.confusion import figures
from fastrot.tasks.segment import SegmentTask

MASKS = "segment.masks"  # what was learnt from, in a checkpoint's state


class SegmentJob(WholeJob[ShownMask, Masks]):
    """A job that learns to segment."""

    def make_task(self) -> SegmentTask:  # type: ignore[override]  # of whole images
        self.say(self.begin.origin.says())
        return task_of(self.config, self.begin.backbone, self.ranks.device)

    def shown(self, name: str) -> Callable[..., ShownMask]:
        """Scaled, cut, mirrored, shifted images with their masks."""
        return view_of(self.config, self.sets[name].known)

    def figures(self) -> dict[str, float]:
        """Mean IoU and accuracies, and each class's IoU, from the confusion of all ranks' pixels."""
        batches = self.val_whole.held_out(self.ranks.world, self.ranks.rank, self.numbers.largest)
        assert isinstance(self.task, SegmentTask)
        found = figures(self.engine.reduce(self.task.evaluate(self.engine.module, batches)))
        each = {f"iou_{number}": value for number, value in enumerate(found.iou)}
        means = {name: getattr(found, name) for name in self.task.figures}
        return means | each

    def maps_of(self, network: nn.Module) -> tuple[nn.Module, int]:
        """All of it."""
        return network, self.config.segment.crop


def task_of(config: Config, backbone: nn.Module, device: torch.device) -> SegmentTask:
    """What a run of `config` learns."""
    chosen = config.segment
    mean, std = ([255 * v for v in values] for values in (config.data.mean, config.data.std))
    return SegmentTask(backbone, chosen.classes, chosen.crop, chosen.slide, chosen.align_corners, mean, std, device)


def view_of(config: Config, masks: Callable[[int], NDArray[np.uint8]]) -> MaskView:
    """How a run of `config` shows images. masks: as of MaskView."""
    chosen = config.segment
    return MaskView(masks, config.run.seed, chosen.base, chosen.scales, chosen.crop, config.data.flip, chosen.distort)


def prepared(checkpoint: str | None, seed: int | None, config: Config, ranks: Ranks) -> Learning:
    """What the run begins from, what makes its job, and what else a resume must find unchanged. Raises UserError.

    checkpoint  of the backbone, or None for the control drawn from `seed`.
    """
    sets: dict[str, Beside[Masks]] = {}

    def classes() -> int:
        sets["train"] = _read(config.data.train, config, ranks, "train")
        if config.data.val:
            sets["val"] = _read(config.data.val, config, ranks, "val")
        return config.segment.classes

    begin = transfer.begin("segment", checkpoint, seed, config, classes)
    contents = distributed.on_first(ranks, lambda: {name: one.known.content() for name, one in sets.items()})
    more = begin.defining("segment") | {MASKS: contents["train"]}
    return Learning(begin, partial(SegmentJob, begin, sets), more)


def _read(source: str | None, config: Config, ranks: Ranks, name: str) -> Beside[Masks]:
    manifest = open_manifest(source, config, ranks, f"data.{name}")
    return Beside(manifest.content, read_masks(manifest, config.segment.classes))
