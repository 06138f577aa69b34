"""Objects and classes of pixels drawn on their images."""

import colorsys
from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as rle
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as V
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from fastrot.data.masks import PALETTE
from fastrot.runs.predict import Mask, Shown
from fastrot.tasks.detect import Found
from fastrot.templates import data_uri

_HEIGHT, _WIDTH = 240, 480  # within which a picture is, pixels
_TURN = (5**0.5 - 1) / 2  # of the circle of hues, from one class to the next: the golden ratio's, which never meets
_OVER = 0.5  # how much of a colour covers the image


def drawn(shown: Shown, found: Found | Mask, classes: list[str]) -> str:
    """A data URI: the image, with boxes, classes and scores (none where they are 1), or the pixels in their classes'
    colours."""
    scale = min(_HEIGHT / shown.size[0], _WIDTH / shown.size[1])
    to = [max(1, round(side * scale)) for side in shown.size]
    image = V.resize(shown.image.cpu(), to, antialias=True)
    over = _objects(image, found, scale, classes) if isinstance(found, Found) else _classes(image, found)
    return data_uri(Image.fromarray(over.permute(1, 2, 0).numpy()), "JPEG")


def legend(labels: Iterable[int], classes: list[str]) -> list[tuple[str, str]]:
    """(class, colour as a page writes it) of these classes of pixels."""
    known = sorted(label for label in set(labels) if label < len(classes))
    return [(classes[label], "#" + PALETTE[label].tobytes().hex()) for label in known]


def _objects(image: Tensor, found: Found, scale: float, classes: list[str]) -> Tensor:
    """The surest on top."""
    if not len(found.label):
        return image
    order = np.argsort(found.score, kind="stable")
    colours = [_bright(label) for label in found.label[order].tolist()]
    if found.masks:
        masks = torch.from_numpy(rle.decode([found.masks[at] for at in order.tolist()])).permute(2, 0, 1)
        masks = V.resize(masks, list(image.shape[-2:]), InterpolationMode.NEAREST).bool()
        for mask, colour in zip(masks, colours, strict=True):  # together they would be black where they overlap
            image = draw_segmentation_masks(image, mask, _OVER, colour)
    names = [classes[label] for label in found.label[order].tolist()]
    scores = [f" {score:.2f}" if score < 1 else "" for score in found.score[order].tolist()]
    boxed: Tensor = draw_bounding_boxes(
        image,
        torch.from_numpy(found.box[order]) * scale,
        [name + score for name, score in zip(names, scores, strict=True)],
        colours,
        width=2,
        label_colors="black",
        label_background_colors=colours,
        fill_labels=True,
    )
    return boxed


def _bright(label: int) -> tuple[int, int, int]:
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(label * _TURN % 1, 0.7, 1))
    return red, green, blue


def _classes(image: Tensor, mask: Mask) -> Tensor:
    colours = torch.from_numpy(PALETTE[mask]).permute(2, 0, 1)
    colours = V.resize(colours, list(image.shape[-2:]), InterpolationMode.NEAREST)
    both: Tensor = (image * (1 - _OVER) + colours * _OVER).round().to(torch.uint8)
    return both
