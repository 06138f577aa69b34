"""What segmentation shows of a whole image: scaled, cut where not one class fills it, mirrored, its colours shifted.

Keyed by (seed, row, epoch): purpose SCALE, word 1: the factor; purpose PLACE, block a: attempt a at a crop, words 0 and
1: top and left; purpose FLIP: as everywhere; purpose PHOTOMETRIC, block 0: the four coins, 1: whether contrast comes
first (word 0), 2: brightness, contrast, saturation, hue.
Source: protocol "Segmentation", train order; mmsegmentation's Resize, RandomCrop, PhotoMetricDistortion.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as V

from fastrot.data.augment import flips
from fastrot.data.masks import IGNORED
from fastrot.data.randomness import PHOTOMETRIC, PLACE, SCALE, below, philox, uniform

_REDRAWS = 10
_MOST_OF_ONE = 0.75  # of the labelled pixels of a crop


@dataclass(frozen=True)
class ShownMask:
    """image uint8 [3, h, w]; mask uint8 [h, w], 255 where no class is known; size: height and width before resizing."""

    image: Tensor
    mask: Tensor
    size: tuple[int, int]

    def to(self, device: torch.device) -> "ShownMask":
        """The same on `device`."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ("image", "mask")}
        return replace(self, **moved)


def sides_within(size: tuple[int, int], base: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the largest image of these proportions within `base` = (long, short)."""
    scale = min(max(base) / max(size), min(base) / min(size))
    return int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)


@dataclass(frozen=True)
class MaskView:
    """`prepare` of a WholeLoader: (upright RGB image, row, epoch) -> ShownMask; epoch -1: resized to `base` alone.

    mask_of   row -> class of each pixel, uint8 [h, w], 255: none.  base  (long, short) side before scaling.
    scales    the range of the factor.  crop  side of what training shows, padded where the image is smaller.
    distort   whether colours are shifted.
    In evaluation the mask stays as large as it is.
    """

    mask_of: Callable[[int], NDArray[np.uint8]]
    seed: int
    base: tuple[int, int]
    scales: tuple[float, float]
    crop: int
    flip: float
    distort: bool

    def __call__(self, picture: Image.Image, row: int, epoch: int) -> ShownMask:
        size, mask = (picture.height, picture.width), self.mask_of(row)
        pixels = V.pil_to_tensor(picture)
        if epoch < 0:
            shown = V.resize(pixels, list(sides_within(size, self.base)), antialias=True)
            return ShownMask(shown, torch.from_numpy(mask), size)
        u = float(uniform(philox(self.seed, row, epoch, SCALE))[0, 1])
        factor = self.scales[0] + (self.scales[1] - self.scales[0]) * u
        to = sides_within(size, (int(self.base[0] * factor), int(self.base[1] * factor)))
        image = V.resize(pixels, list(to), antialias=True)
        mask = np.array(Image.fromarray(mask).resize(to[::-1], Image.Resampling.NEAREST))
        top, left = self._place(mask, row, epoch)
        image = image[:, top : top + self.crop, left : left + self.crop]
        mask = mask[top : top + self.crop, left : left + self.crop]
        if flips(self.seed, np.array([row]), np.array([epoch]), self.flip)[0]:
            image, mask = image.flip(2), mask[:, ::-1]
        if self.distort:
            image = distorted(image, *distortion(self.seed, row, epoch))
        return ShownMask(image.contiguous(), torch.from_numpy(np.ascontiguousarray(mask)), size)

    def _place(self, mask: NDArray[np.uint8], row: int, epoch: int) -> tuple[int, int]:
        """Top and left of the first crop whose largest class is under 75% of its labelled pixels, or of the tenth redrawn."""
        room = np.maximum(np.array(mask.shape) - self.crop, 0) + 1
        for attempt in range(1 + _REDRAWS):
            top, left = below(philox(self.seed, row, epoch, PLACE, attempt)[0, :2], room).tolist()
            some = mask[top : top + self.crop, left : left + self.crop]
            counts = np.bincount(some[some != IGNORED])
            if (counts > 0).sum() > 1 and counts.max() / counts.sum() < _MOST_OF_ONE:
                break
        return top, left


def distortion(seed: int, row: int, epoch: int) -> tuple[NDArray[np.bool_], bool, NDArray[np.float64]]:
    """Which of brightness, contrast, saturation, hue are shifted; whether contrast comes before the last two; how much.

    Brightness is added, +-32; contrast and saturation are factors, 0.5 to 1.5; hue is added, +-18 of 180.
    """
    coins = uniform(philox(seed, row, epoch, PHOTOMETRIC))[0] < 0.5
    first = bool(uniform(philox(seed, row, epoch, PHOTOMETRIC, 1))[0, 0] < 0.5)
    u = uniform(philox(seed, row, epoch, PHOTOMETRIC, 2))[0]
    return coins, first, np.array([64 * u[0] - 32, 0.5 + u[1], 0.5 + u[2], np.floor(36 * u[3]) - 18])


def distorted(image: Tensor, coins: NDArray[np.bool_], contrast_first: bool, by: NDArray[np.float64]) -> Tensor:
    """The image uint8 [3, h, w], RGB, with its colours shifted as mmsegmentation's PhotoMetricDistortion does."""
    x = image.permute(1, 2, 0).numpy()
    if coins[0]:
        x = _linear(x, 1.0, by[0])
    if coins[1] and contrast_first:
        x = _linear(x, by[1], 0.0)
    if coins[2] or coins[3]:
        hsv = cv2.cvtColor(np.ascontiguousarray(x), cv2.COLOR_RGB2HSV)
        if coins[2]:
            hsv[..., 1] = _linear(hsv[..., 1], by[2], 0.0)
        if coins[3]:
            hsv[..., 0] = ((hsv[..., 0].astype(int) + int(by[3])) % 180).astype(np.uint8)
        x = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if coins[1] and not contrast_first:
        x = _linear(x, by[1], 0.0)
    return torch.from_numpy(np.ascontiguousarray(x)).permute(2, 0, 1)


def _linear(x: NDArray[Any], factor: float, more: float) -> NDArray[np.uint8]:
    return (x.astype(np.float32) * factor + more).clip(0, 255).astype(np.uint8)
