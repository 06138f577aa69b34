"""What a detector's findings are worth: COCO's APs by faster-coco-eval or pycocotools, VOC's by both rules."""

import contextlib
import io
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrot.data.objects import Objects
from fastrot.tasks.detect import Found
from fastrot.tasks.voc_ap import DETECTRON2, MMDET, Detections, average_precision
from fastrot.tasks.voc_ap import Objects as Truth

VOC = {
    "ap50": "held-out AP50, 11 points, as mmdetection",
    "ap50_area": "held-out AP50 under the envelope",
    "d2_ap": "held-out AP, as detectron2 on VOC",
    "d2_ap50": "held-out AP50, as detectron2 on VOC",
    "d2_ap75": "held-out AP75, as detectron2 on VOC",
}
_COCO = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
COCO_BOXES = dict(zip(_COCO, ("held-out box AP", "AP50", "AP75", "AP small", "AP medium", "AP large"), strict=True))
COCO_MASKS = {f"mask_{name}": f"mask {says.removeprefix('held-out box ')}" for name, says in COCO_BOXES.items()}
_TEN: list[float] = np.arange(0.5, 1.0, 0.05).tolist()

_FASTER = "faster_coco_eval"  # the same figures, faster, where it is installed
COCO: Any = import_module(_FASTER if find_spec(_FASTER) else "pycocotools.coco").COCO
COCOeval: Any = (
    import_module(_FASTER).COCOeval_faster if find_spec(_FASTER) else import_module("pycocotools.cocoeval").COCOeval
)


def coco_figures(objects: Objects, sizes: NDArray[np.int32], found: Sequence[Found], masks: bool) -> dict[str, float]:
    """Box APs, and with `masks` mask_ APs, 0..1; nan where no object of that size is there. ap_3, mask_ap_3: class 3's.

    sizes int32 [N, 2], height and width of each image; found: one an image.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints as it goes
        truth = COCO()
        truth.dataset = _dataset(objects, sizes)
        truth.createIndex()
        results = _results(objects, found)
        figures = _judged(truth, results, "bbox", "", objects.category)
        if masks:
            figures |= _judged(
                truth,
                [{k: v for k, v in one.items() if k != "bbox"} for one in results],
                "segm",
                "mask_",
                objects.category,
            )
    return figures


def _judged(
    truth: COCO, results: list[dict[str, Any]], kind: str, prefix: str, category: list[int]
) -> dict[str, float]:
    found = COCO()
    if results:
        found = truth.loadRes(results)
    else:  # which it refuses
        found.dataset = truth.dataset | {"annotations": []}
        found.createIndex()
    judge = COCOeval(truth, found, kind)
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    named = dict(zip(_COCO, judge.stats[:6], strict=True))
    precision = judge.eval["precision"][..., 0, -1]  # [10, 101, classes], of all sizes, -1 where there is no object
    for label, number in enumerate(category):
        named[f"ap_{label}"] = precision[..., judge.params.catIds.index(number)].mean()
    return {prefix + name: float(v) if v >= 0 else float("nan") for name, v in named.items()}


def _dataset(objects: Objects, sizes: NDArray[np.int32]) -> dict[str, Any]:
    entries = []
    for row, image in enumerate(objects.image_id.tolist()):
        mine = objects.of(row)
        for one in range(mine.start, mine.stop):
            x1, y1, x2, y2 = objects.box[one].tolist()
            entry = {
                "id": one + 1,  # pycocotools takes a match with 0 for none
                "image_id": image,
                "category_id": objects.category[objects.label[one]],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": float(objects.area[one]),
                "iscrowd": int(objects.aside[one]),
            }
            if objects.has_masks:
                entry["segmentation"] = objects.rle_of(one, *sizes[row].tolist())
            entries.append(entry)
    return {
        "images": [
            {"id": image, "height": h, "width": w}
            for image, (h, w) in zip(objects.image_id.tolist(), sizes.tolist(), strict=True)
        ],
        "annotations": entries,
        "categories": [{"id": n, "name": c} for n, c in zip(objects.category, objects.classes, strict=True)],
    }


def _results(objects: Objects, found: Sequence[Found]) -> list[dict[str, Any]]:
    """As COCO's results: one entry a detection."""
    results = []
    for one in found:
        for at, (x1, y1, x2, y2) in enumerate(one.box.tolist()):
            entry = {
                "image_id": int(objects.image_id[one.row]),
                "category_id": objects.category[one.label[at]],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": float(one.score[at]),
            }
            results.append(entry | ({"segmentation": one.masks[at]} if one.masks else {}))
    return results


def voc_figures(objects: Objects, found: Sequence[Found]) -> dict[str, float]:
    """Mean over classes, 0..1: ap50 as mmdetection (11 points), ap50_area under the envelope; as detectron2: d2_ap (mean
    of ten thresholds), d2_ap50, d2_ap75. ap50_3: class 3's. Classes without an object to find are left out, theirs nan."""
    image = np.concatenate([np.full(len(one.label), one.row) for one in found] or [np.zeros(0, np.int64)])
    box, score, label = (
        np.concatenate([getattr(one, name) for one in found]) if found else np.zeros((0, 4) if name == "box" else 0)
        for name in ("box", "score", "label")
    )
    rows = np.repeat(np.arange(len(objects)), np.diff(objects.first))
    table, each = [], dict.fromkeys((f"ap50_{number}" for number in range(len(objects.classes))), float("nan"))
    for number in range(len(objects.classes)):
        mine, true = label == number, objects.label == number
        of = Detections(image[mine], box[mine].astype(np.float64), score[mine].astype(np.float64))
        there = Truth(rows[true], objects.box[true].astype(np.float64), np.asarray(objects.aside[true]))
        if not (~there.difficult).any():
            continue
        theirs = average_precision(of, there, 0.5, MMDET)
        ten = [average_precision(of, there, threshold, DETECTRON2).eleven for threshold in _TEN]
        each[f"ap50_{number}"] = theirs.eleven
        table.append((theirs.eleven, theirs.area, float(np.mean(ten)), ten[0], ten[5]))
    means = np.array(table).mean(0) if table else np.full(5, np.nan)
    return dict(zip(VOC, means.tolist(), strict=True)) | each
