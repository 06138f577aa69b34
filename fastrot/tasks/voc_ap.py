"""Pascal VOC's average precision of detections, as mmdetection and as detectron2 count it. Arrays in, numbers out.

| | a match needs | areas | reads |
|---|---|---|---|
| MMDET | IoU >= threshold | without + 1 | protocol "Detection", Metrics: AP50 |
| DETECTRON2 | IoU > threshold | pixels, + 1 | the devkit's own rule: AP, AP50, AP75 |

Both pass over detections of difficult objects, take the 11-point mean in 2007, and count a second detection of an
object as false.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Rule:
    """inclusive: IoU equal to the threshold matches.  pixel: added to widths and heights, 0 or 1.

    recall  type of recalls: 3 of 10 objects reach numpy's third tenth, 0.30000000000000004, in float32 alone.
    """

    inclusive: bool
    pixel: float
    recall: type[np.floating]


MMDET, DETECTRON2 = Rule(True, 0.0, np.float32), Rule(False, 1.0, np.float64)
TENTHS = np.arange(0, 1.1, 0.1)  # as both write them


@dataclass(frozen=True)
class Detections:
    """Of one class over all images. image int64 [n]; box float64 [n, 4] (x1, y1, x2, y2); score float64 [n]."""

    image: NDArray[np.int64]
    box: Floats
    score: Floats


@dataclass(frozen=True)
class Objects:
    """True ones of one class. image int64 [m]; box float64 [m, 4]; difficult bool [m]."""

    image: NDArray[np.int64]
    box: Floats
    difficult: Bools


def overlaps(box: Floats, others: Floats, pixel: float = 0.0) -> Floats:
    """IoU [m] of a box [4] with others [m, 4]; 0 where neither has an area."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    shared = np.clip(high - low + pixel, 0, None).prod(1)
    both = (box[2:] - box[:2] + pixel).prod() + (others[:, 2:] - others[:, :2] + pixel).prod(1) - shared
    shares: Floats = np.divide(shared, both, out=np.zeros_like(shared), where=both > 0)
    return shares


def matched(found: Detections, true: Objects, threshold: float, rule: Rule) -> tuple[Bools, Bools]:
    """(right, wrong) of the detections from the surest to the least; where both are false it is of a difficult object.

    Equal scores keep their order.
    """
    order = np.argsort(-found.score, kind="stable")
    of_image = {int(image): np.flatnonzero(true.image == image) for image in np.unique(true.image)}
    taken = np.zeros(len(true.image), bool)
    right, wrong = np.zeros(len(order), bool), np.zeros(len(order), bool)
    for rank, at in enumerate(order):
        candidates = of_image.get(int(found.image[at]))
        if candidates is None:
            wrong[rank] = True
            continue
        iou = overlaps(found.box[at], true.box[candidates], rule.pixel)
        best = int(iou.argmax())
        one = candidates[best]
        if not (iou[best] >= threshold if rule.inclusive else iou[best] > threshold):
            wrong[rank] = True
        elif not true.difficult[one]:
            right[rank], wrong[rank], taken[one] = not taken[one], taken[one], True
    return right, wrong


@dataclass(frozen=True)
class AveragePrecision:
    """eleven: mean of the best precision at recalls 0, 0.1 ... 1 (VOC 2007); area: under the envelope (2010 on)."""

    eleven: float
    area: float


def average_precision(found: Detections, true: Objects, threshold: float, rule: Rule) -> AveragePrecision:
    """Of one class, 0..1; nan where no object of it is there to be found."""
    objects = int((~true.difficult).sum())
    if objects == 0:
        return AveragePrecision(float("nan"), float("nan"))
    right, wrong = (part.cumsum() for part in matched(found, true, threshold, rule))
    recall, precision = right / objects, right / np.maximum(right + wrong, 1)
    eleven = [precision[recall.astype(rule.recall) >= at].max(initial=0.0) for at in TENTHS]
    envelope = np.maximum.accumulate(np.append(precision, 0.0)[::-1])[::-1]
    steps = np.diff(recall, prepend=0.0)
    return AveragePrecision(float(np.mean(eleven)), float((steps * envelope[:-1]).sum()))
