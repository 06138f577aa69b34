"""Detection: whole images and their objects -> the losses of a detector; and what it finds."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as rle
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import ResNet
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from fastrot.data.whole import WholeBatch
from fastrot.data.whole_objects import ShownObjects
from fastrot.models.detector import Target, faster_rcnn_c4, mask_rcnn_fpn

MODELS: dict[str, Callable[[nn.Module, int, int], GeneralizedRCNN]] = {"c4": faster_rcnn_c4, "fpn": mask_rcnn_fpn}
_LOSSES = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg")


@dataclass(frozen=True)
class Found:
    """What was found in one image, in pixels of the image as it is, the surest first.

    box float32 [n, 4]; score float32 [n]; label int64 [n]; masks: COCO's RLEs, one an object, or none.
    """

    row: int
    box: NDArray[np.float32]
    score: NDArray[np.float32]
    label: NDArray[np.int64]
    masks: list[dict[str, Any]]


class DetectTask:
    """What is learnt: images and objects -> the sum of a detector's losses, a mean over the images of a batch.

    backbone   a ResNet whose weights the detector begins with.  model: a name of MODELS.
    regions    sampled an image in training.
    mean, std  of the channels on the 0..255 scale.  figures: as of every task.
    """

    title = "detection"

    def __init__(
        self,
        backbone: ResNet,
        model: str,
        classes: int,
        regions: int,
        mean: list[float],
        std: list[float],
        device: torch.device,
        figures: dict[str, str],
    ):
        self.device = device
        self._backbone, self._model, self._classes, self._regions = backbone, model, classes, regions
        self._mean, self._std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (mean, std))
        self._losses = (*_LOSSES, "loss_mask") if model == "fpn" else _LOSSES
        self.metrics = ("loss", "count", *self._losses)
        self.figures = figures

    def build_model(self, arch: str, seed: int) -> GeneralizedRCNN:
        """The detector on a copy of the backbone; `arch` is the backbone's own."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = MODELS[self._model](deepcopy(self._backbone), self._classes, self._regions)
        network.train().requires_grad_(True)
        return network.to(memory_format=torch.contiguous_format)  # the backbone's differs; DeepSpeed wants rows

    def views(self, batch: WholeBatch[ShownObjects]) -> list[Tensor]:
        """Normalised images, fp32 [3, h, w] each, of several sizes."""
        return [(sample.image.to(self.device) - self._mean) / self._std for sample in batch.samples]

    def loss(
        self, module: Callable[..., dict[str, Tensor]], views: list[Tensor], batch: WholeBatch[ShownObjects]
    ) -> tuple[Tensor, Tensor]:
        """(the losses times the number of images, float64 [len(metrics)] sums on the device)."""
        losses = module(views, [_target(sample) for sample in batch.samples])
        each = torch.stack([losses[name] for name in self._losses])
        count = len(views)
        sums = torch.cat([each.sum()[None], each.new_ones(1), each]).detach().double() * count
        return each.sum() * count, sums

    def summary(self, sums: Tensor) -> dict[str, float]:
        """Mean losses of an image."""
        loss, count, *each = sums.tolist()
        return {"loss": loss / count} | {name: one / count for name, one in zip(self._losses, each, strict=True)}

    @torch.no_grad()
    def evaluate(self, module: Callable[..., list[Target]], batches: Iterable[WholeBatch[ShownObjects]]) -> list[Found]:
        """What is found in this rank's images; the caller puts the detector in eval mode."""
        found = []
        for batch in batches:
            for row, sample, one in zip(batch.rows.tolist(), batch.samples, module(self.views(batch)), strict=True):
                found.append(_as_found(row, sample, one))
        return found


def _target(sample: ShownObjects) -> Target:
    """As torchvision's detectors take it: class 0 is the background."""
    return {"boxes": sample.boxes, "labels": sample.labels + 1, "masks": sample.masks}


def _as_found(row: int, sample: ShownObjects, one: Target) -> Found:
    height, width = sample.size
    shown = sample.image.shape[-2:]
    scale = one["boxes"].new_tensor([width / shown[1], height / shown[0]]).repeat(2)
    boxes = one["boxes"].float() * scale
    masks: list[dict[str, Any]] = []
    if "masks" in one:
        cells = paste(one["masks"][:, 0].float(), boxes, sample.size) >= 0.5
        masks = [rle.encode(np.asfortranarray(cell)) for cell in cells.to(torch.uint8).cpu().numpy()]
    box, score, label = (t.cpu().numpy() for t in (boxes, one["scores"].float(), one["labels"] - 1))
    return Found(row, box, score, label, masks)


def paste(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks [n, m, m] stretched bilinearly over their boxes [n, 4] in an image of `size`: fp32 [n, height, width].

    Source: mmdetection's FCNMaskHead, _do_paste_mask.
    """
    centres = (torch.arange(side, device=boxes.device) + 0.5 for side in size)
    low, wide = boxes[:, :2], (boxes[:, 2:] - boxes[:, :2]).clamp(min=1e-6)
    y, x = (
        (of[None] - low[:, axis : axis + 1]) / wide[:, axis : axis + 1] * 2 - 1
        for of, axis in zip(centres, (1, 0), strict=True)
    )
    grid = torch.stack([x[:, None].expand(-1, y.shape[1], -1), y[:, :, None].expand(-1, -1, x.shape[1])], dim=-1)
    return F.grid_sample(masks[:, None], grid.to(masks), align_corners=False)[:, 0]
