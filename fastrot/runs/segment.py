"""`fastrot segment`: a segmenter on a pretrained backbone learns the class of each pixel, in a run folder like any other."""

from collections.abc import Callable
from functools import partial

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


class SegmentJob(WholeJob[ShownMask, Masks]):
    """A job that learns to segment."""

    def make_task(self) -> SegmentTask:  # type: ignore[override]  # of whole images
        config, chosen = self.config, self.config.segment
        self.say(self.begin.origin.says())
        return SegmentTask(
            self.begin.backbone,
            chosen.classes,
            chosen.crop,
            chosen.slide,
            chosen.align_corners,
            [255 * v for v in config.data.mean],
            [255 * v for v in config.data.std],
            self.ranks.device,
        )

    def shown(self, name: str) -> Callable[..., ShownMask]:
        """Scaled, cut, mirrored, shifted images with their masks."""
        chosen, config = self.config.segment, self.config
        masks = self.sets[name].known
        return MaskView(
            masks, config.run.seed, chosen.base, chosen.scales, chosen.crop, config.data.flip, chosen.distort
        )

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
    more = begin.defining("segment") | {"segment.masks": contents["train"]}
    return Learning(begin, partial(SegmentJob, begin, sets), more)


def _read(source: str | None, config: Config, ranks: Ranks, name: str) -> Beside[Masks]:
    manifest = open_manifest(source, config, ranks, f"data.{name}")
    return Beside(manifest.content, read_masks(manifest, config.segment.classes))
