"""Segmentation: whole images and the class of each pixel -> cross-entropy; and an exact confusion matrix."""

from collections.abc import Callable, Iterable
from copy import deepcopy

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models import ResNet

from fastrot.data.masks import IGNORED
from fastrot.data.whole import WholeBatch
from fastrot.data.whole_masks import ShownMask
from fastrot.models.segmenter import Segmenter, segmentation_loss
from fastrot.tasks.confusion import confusion

Logits = Callable[[Tensor], tuple[Tensor, ...]]


class SegmentTask:
    """What is learnt: images and masks -> cross-entropy of the head, and 0.4 of the auxiliary head's.

    backbone   a ResNet whose weights the segmenter begins with.
    crop       side of training's crops, to which smaller images are padded.
    slide      (side, stride) of the windows that evaluation slides over an image; None: the whole image at once.
    align_corners  how logits are resized.
    mean, std  of the channels on the 0..255 scale.
    """

    title = "segmentation"
    metrics = ("loss", "count", "right", "pixels")

    def __init__(
        self,
        backbone: ResNet,
        classes: int,
        crop: int,
        slide: tuple[int, int] | None,
        align_corners: bool,
        mean: list[float],
        std: list[float],
        device: torch.device,
    ):
        self.device = device
        self._backbone, self._classes, self._crop = backbone, classes, crop
        self._slide, self._align = slide, align_corners
        self._mean, self._std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (mean, std))
        self.figures = {
            "mean_iou": "held-out mean IoU",
            "mean_accuracy": "held-out mean accuracy of the classes",
            "all_accuracy": "held-out accuracy of all pixels",
        }

    def build_model(self, arch: str, seed: int) -> Segmenter:
        """The segmenter on a copy of the backbone; `arch` is the backbone's own."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = Segmenter(deepcopy(self._backbone), self._classes, self._align)
        network.train().requires_grad_(True)
        network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # the backbone's differs; DeepSpeed wants rows
        return network

    def views(self, batch: WholeBatch[ShownMask]) -> Tensor:
        """Normalised crops, fp32 [n, 3, crop, crop]; zeros at the right and below where the image is smaller."""
        images = [_padded(self._normalised(sample.image), self._crop, 0.0) for sample in batch.samples]
        return torch.stack(images).contiguous(memory_format=torch.channels_last)

    def loss(self, module: Logits, views: Tensor, batch: WholeBatch[ShownMask]) -> tuple[Tensor, Tensor]:
        """(the loss times the number of images, float64 [len(metrics)] sums on the device)."""
        target = torch.stack([_padded(sample.mask, self._crop, IGNORED) for sample in batch.samples]).long()
        logits = tuple(one.float() for one in module(views))
        loss = segmentation_loss(logits, target) * len(views)
        known = target != IGNORED
        right = ((logits[0].argmax(1) == target) & known).sum()
        return loss, torch.stack([loss.detach(), loss.new_tensor(len(views)), right, known.sum()]).double()

    def summary(self, sums: Tensor) -> dict[str, float]:
        """Mean loss of an image, and the share of known pixels that the head has right."""
        loss, count, right, pixels = sums.tolist()
        return {"loss": loss / count, "accuracy": right / max(pixels, 1)}

    @torch.no_grad()
    def evaluate(self, module: Logits, batches: Iterable[WholeBatch[ShownMask]]) -> Tensor:
        """Confusion matrix, int64 [classes, classes], of this rank's images; the caller puts the heads in eval mode."""
        matrix = torch.zeros(self._classes, self._classes, dtype=torch.int64, device=self.device)
        for batch in batches:
            for sample in batch.samples:
                mask = sample.mask.to(self.device)
                matrix += confusion(
                    self.classes_of(module, sample.image, (mask.shape[0], mask.shape[1])), mask, self._classes
                )
        return matrix

    @torch.no_grad()
    def classes_of(self, module: Logits, image: Tensor, size: tuple[int, int]) -> Tensor:
        """The class of each pixel, int64 [height, width] of `size`, of an image uint8 [3, h, w]."""
        x = self._normalised(image)[None]
        logits = self._slid(module, x, *self._slide) if self._slide else module(x)[0].float()
        logits = F.interpolate(logits, size, mode="bilinear", align_corners=self._align)
        return logits.argmax(1)[0]

    def _slid(self, module: Logits, x: Tensor, side: int, stride: int) -> Tensor:
        """Logits [1, classes, h, w]: the mean of all windows over a pixel; the last window ends with the image."""
        height, width = x.shape[-2:]
        total, times = x.new_zeros(1, self._classes, height, width), x.new_zeros(1, 1, height, width)
        for top in _starts(height, side, stride):
            for left in _starts(width, side, stride):
                window = (..., slice(top, top + side), slice(left, left + side))
                total[window] += module(x[window])[0].float()
                times[window] += 1
        return total / times

    def _normalised(self, image: Tensor) -> Tensor:
        return (image.to(self.device) - self._mean) / self._std


def _starts(length: int, side: int, stride: int) -> list[int]:
    """Where windows of `side` begin, `stride` apart; the last is moved back to end with the image."""
    count = max(length - side + stride - 1, 0) // stride + 1
    return [max(min(number * stride, length - side), 0) for number in range(count)]


def _padded(x: Tensor, side: int, value: float) -> Tensor:
    return F.pad(x, (0, side - x.shape[-1], 0, side - x.shape[-2]), value=value)
