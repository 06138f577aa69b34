"""Segmentation's figures from an exact confusion matrix, which is summed over images and ranks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastrot.data.masks import IGNORED


def confusion(predicted: Tensor, true: Tensor, classes: int) -> Tensor:
    """int64 [classes, classes]: pixels of a true class (row) that were given a class (column).

    predicted, true  of one shape, whole numbers; pixels whose true class is 255 do not count.
    """
    seen = true != IGNORED
    cells = true[seen].long() * classes + predicted[seen].long()
    return torch.bincount(cells, minlength=classes**2).view(classes, classes)


@dataclass(frozen=True)
class Segmented:
    """0..1; iou and accuracy [classes] are nan for a class that is nowhere (iou: neither true nor given)."""

    mean_iou: float
    mean_accuracy: float
    all_accuracy: float
    iou: list[float]
    accuracy: list[float]


def figures(matrix: Tensor) -> Segmented:
    """Mean IoU over classes, of intersections and unions of the whole set; mean and overall pixel accuracy."""
    cells = matrix.double()
    right, true, given = cells.diagonal(), cells.sum(1), cells.sum(0)
    iou, accuracy = right / (true + given - right), right / true
    mean_iou, mean_accuracy = (float(values.nanmean()) for values in (iou, accuracy))
    return Segmented(mean_iou, mean_accuracy, float(right.sum() / cells.sum()), iou.tolist(), accuracy.tolist())
