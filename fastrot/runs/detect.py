"""`fastrot detect`: a detector on a pretrained backbone learns boxes, and masks, in a run folder like any other."""

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from fastrot import distributed, machine
from fastrot.config import Config
from fastrot.data.build import open_manifest
from fastrot.data.objects import Objects, read_objects
from fastrot.data.whole_objects import ObjectView, ShownObjects
from fastrot.distributed import Ranks
from fastrot.errors import UserError
from fastrot.files import remove
from fastrot.models.detector import WithRegions
from fastrot.runs import transfer
from fastrot.runs.transfer import Learning
from fastrot.runs.whole import Beside, WholeJob
from fastrot.sending import read_by_all
from fastrot.tasks.detect import DetectTask, Found
from fastrot.tasks.detection_figures import COCO_BOXES, COCO_MASKS, VOC, coco_figures, voc_figures

Sets = dict[str, Beside[Objects]]
CLASSES = "detect.classes"  # [COCO's number, name] of each, in a checkpoint's state


class DetectJob(WholeJob[ShownObjects, Objects]):
    """A job that learns to detect."""

    def make_task(self) -> DetectTask:  # type: ignore[override]  # of whole images
        self.say(self.begin.origin.says())
        for name, one in self.sets.items():
            self.say(f"data.{name}: {_says(one.known)}")
        return task_of(self.config, self.begin.backbone, self.begin.classes, self.ranks.device)

    def shown(self, name: str) -> Callable[..., ShownObjects]:
        """Resized, mirrored images with their objects."""
        return view_of(self.config, self.sets[name].known)

    def figures(self) -> dict[str, float]:
        """VOC's or COCO's, of what all ranks find."""
        batches = self.val_whole.held_out(self.ranks.world, self.ranks.rank, 1)  # padding would change with its batch
        assert isinstance(self.task, DetectTask)
        mine = self.task.evaluate(self.engine.module, batches)
        every: list[list[Found]] = [[]] * self.ranks.world
        dist.all_gather_object(every, mine)
        return distributed.on_first(self.ranks, lambda: self._judged(every))

    def _judged(self, every: list[list[Found]]) -> dict[str, float]:
        found = list({one.row: one for part in every for one in part}.values())  # one that replaced another counts once
        objects = self.sets["val"].known
        if self.config.detect.figures == "voc":
            return voc_figures(objects, found)
        assert self.val is not None
        sizes = np.stack([self.val.height, self.val.width], 1)
        return coco_figures(objects, sizes, found, "mask_ap" in self.task.figures)

    def maps_of(self, network: nn.Module) -> tuple[nn.Module, int]:
        """Backbone and heads, as many regions as training samples."""
        short, most = max(self.config.detect.shorts), self.config.detect.longest
        side = int((short * min(most, short * 4 / 3)) ** 0.5) // 32 * 32 or 32
        return WithRegions(network), side


def task_of(config: Config, backbone: nn.Module, classes: int, device: torch.device) -> DetectTask:
    """What a run of `config` learns."""
    chosen = config.detect
    mean, std = ([255 * v for v in values] for values in (config.data.mean, config.data.std))
    figures = figures_of(chosen.model, chosen.figures)
    return DetectTask(backbone, chosen.model, classes, chosen.regions, mean, std, device, figures)


def view_of(config: Config, objects: Objects) -> ObjectView:
    """How a run of `config` shows images."""
    chosen = config.detect
    return ObjectView(objects, config.run.seed, chosen.shorts, chosen.test_short, chosen.longest, config.data.flip)


def figures_of(model: str, figures: str) -> dict[str, str]:
    """Names of the held-out figures and what they are; the first judges."""
    if figures == "voc":
        return VOC
    return COCO_BOXES | (COCO_MASKS if model == "fpn" else {})


def _says(objects: Objects) -> str:
    """A line for a person."""
    left = "".join(f"; {count:,} times: {reason}" for reason, count in sorted(objects.left_out.items()))
    aside = int(objects.aside.sum())
    return f"{len(objects.label):,} objects in {len(objects):,} images, {aside:,} of them set aside{left}"


def prepared(checkpoint: str | None, seed: int | None, config: Config, ranks: Ranks) -> Learning:
    """What the run begins from, what makes its job, what chooses its images: those with an object to learn; and what
    else a resume must find unchanged. Raises UserError.

    checkpoint  of the backbone, or None for the control drawn from `seed`.
    """
    sets: Sets = {}

    def classes() -> int:
        sets.update(_sets(config, ranks))
        return len(sets["train"].known.classes)

    begin = transfer.begin("detect", checkpoint, seed, config, classes)
    learnable = sets["train"].known.learnable()
    manifest = open_manifest(config.data.train, config, ranks, "data.train").some(learnable)
    sets["train"] = Beside(manifest.content, sets["train"].known.some(learnable))
    objects = sets["train"].known
    classes_of = [list(pair) for pair in zip(objects.category, objects.classes, strict=True)]
    more = begin.defining("detect") | {"detect.objects": objects.content(), CLASSES: classes_of}
    return Learning(begin, partial(DetectJob, begin, sets), more, lambda every: every.some(learnable))


def _sets(config: Config, ranks: Ranks) -> Sets:
    """The objects of both sets, checked against each other and the config."""
    sources = {"train": config.data.train, "val": config.data.val}
    sets = {name: _read(source, config, ranks, name) for name, source in sources.items() if source or name == "train"}
    objects = sets["train"].known
    if not len(objects.learnable()):
        raise UserError(f"{config.data.train}: no image has an object to learn")
    for name, one in sets.items():
        if one.known.classes != objects.classes:
            odd = sorted(set(one.known.classes) ^ set(objects.classes))[:3] or ["the same in another order"]
            raise UserError(f"{sources[name]}: other classes than {sources['train']}: {', '.join(odd)}")
        if config.detect.model == "fpn" and not one.known.has_masks:
            raise UserError(f"{sources[name]}: has no masks, which detect.model fpn learns; set detect.model=c4")
    if "val" in sets and not len(sets["val"].known.learnable()):
        raise UserError(f"{config.data.val}: no image has an object to find")
    return sets


def _read(source: str | None, config: Config, ranks: Ranks, name: str) -> Beside[Objects]:
    """Read on rank 0, mapped by all."""
    manifest = open_manifest(source, config, ranks, f"data.{name}")

    def read() -> Path:
        cache = machine.cache_folder() / "objects"
        cache.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=cache))
        read_objects(manifest).save(folder)
        return folder

    with read_by_all(ranks, read) as folder:
        objects = Objects.load(folder)
        dist.barrier()  # every rank has mapped them: they need no name any more
    if ranks.first:
        remove(folder)
    return Beside(manifest.content, objects)
