"""What detection shows of a whole image: one of some scales, mirrored or not, its boxes and masks with it.

Keyed by (seed, row, epoch): purpose SCALE, word 0: which of the short sides; purpose FLIP: as everywhere.
Source: protocol "Detection", train and test scale; mmdetection's Resize (keep_ratio) and RandomFlip.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as rle
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as V

from fastrot.data.augment import flips
from fastrot.data.objects import Objects
from fastrot.data.randomness import SCALE, below, philox


@dataclass(frozen=True)
class ShownObjects:
    """An image and what may be learnt of it.

    image uint8 [3, h, w]; boxes fp32 [n, 4] in its pixels; labels int64 [n]; masks uint8 [n, h, w], or [0, h, w]
    where there are none. size: height and width before resizing.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    masks: Tensor
    size: tuple[int, int]

    def to(self, device: torch.device) -> "ShownObjects":
        """The same on `device`."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True) for name in ("image", "boxes", "labels", "masks")
        }
        return replace(self, **moved)


def sides_at(size: tuple[int, int], short: int, most: int) -> tuple[int, int]:
    """Height and width after resizing to a short side, or, where the long one would pass `most`, to that."""
    scale = min(most / max(size), short / min(size))
    return int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)


@dataclass(frozen=True)
class ObjectView:
    """`prepare` of a WholeLoader: (upright RGB image, row, epoch) -> ShownObjects; epoch -1: as evaluation shows it.

    shorts  short sides to choose from in training; test: of evaluation; most: the longest long side.
    """

    objects: Objects
    seed: int
    shorts: tuple[int, ...]
    test: int
    most: int
    flip: float

    def __call__(self, picture: Image.Image, row: int, epoch: int) -> ShownObjects:
        size = (picture.height, picture.width)
        mine = np.arange(*self.objects.of(row).indices(len(self.objects.label)))
        mine = mine[~self.objects.aside[mine]]
        short, mirrored = self.test, False
        if epoch >= 0:
            drawn = below(philox(self.seed, row, epoch, SCALE)[:, 0], len(self.shorts))
            short = self.shorts[int(drawn[0])]
            mirrored = bool(flips(self.seed, np.array([row]), np.array([epoch]), self.flip)[0])
        to = sides_at(size, short, self.most)
        image = V.resize(V.pil_to_tensor(picture), list(to), antialias=True)
        boxes = tv_tensors.BoundingBoxes(
            torch.from_numpy(self.objects.box[mine].copy()), format=tv_tensors.BoundingBoxFormat.XYXY, canvas_size=size
        )
        boxes, masks = V.resize(boxes, list(to)), self._masks(mine, size, to)
        if mirrored:
            image, boxes, masks = (V.horizontal_flip(one) for one in (image, boxes, masks))
        labels = torch.from_numpy(self.objects.label[mine].copy())
        return ShownObjects(image, boxes.as_subclass(Tensor), labels, masks.as_subclass(Tensor), size)

    def _masks(self, mine: NDArray[np.int64], size: tuple[int, int], to: tuple[int, int]) -> Tensor:
        if not self.objects.has_masks or not len(mine):
            none: Tensor = tv_tensors.Mask(torch.zeros(0, *to, dtype=torch.uint8))
            return none
        masks = rle.decode([self.objects.rle_of(one, *size) for one in mine.tolist()])  # [h, w, n]
        resized: Tensor = V.resize(tv_tensors.Mask(torch.from_numpy(masks).permute(2, 0, 1)), list(to))
        return resized
