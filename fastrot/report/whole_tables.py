"""The page's tables of detection and segmentation: a whole network, trained on the images from both backbones."""

import math
import re

from fastrot.report import tables
from fastrot.report.significance import Figure, over_classes, same_classes
from fastrot.report.tables import Data, Pair, Row, Table
from fastrot.tasks.detection_figures import COCO_BOXES, COCO_MASKS, VOC

_COUNTED = (
    "n = {classes} classes, {test:,} test images; 95 % intervals: bootstrap over the classes; p: Wilcoxon's signed-rank "
    "test over the classes; both where each class's figure is kept"
)
# a figure of the run -> its row
_VOC = dict(
    zip(VOC, ("AP50", "AP50, area", "AP, detectron2's", "AP50, detectron2's", "AP75, detectron2's"), strict=True)
)
_COCO = {
    name: f"{kind} {label}"
    for kind, names in (("box", COCO_BOXES), ("mask", COCO_MASKS))
    for name, label in zip(names, ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large"), strict=True)
}
_SEGMENTED = {"mean_iou": "mean IoU", "mean_accuracy": "mean accuracy", "all_accuracy": "accuracy of all pixels"}
# and what the classes' are called, where they are kept
_EACH = {"ap50": "ap50", "ap": "ap", "mask_ap": "mask_ap", "mean_iou": "iou"}


def detected(title: str, theirs: dict[str, float], pair: Pair, data: Data, notes: list[str]) -> Table:
    """A detector: VOC's figures or COCO's, whichever the runs have."""
    labels = _VOC if "held_out_ap50_area" in pair[0] else _COCO
    asks = "Where is which object in the picture? A detector that starts from these weights, every layer trained on."
    return _table(f"Detection, {title}", "AP, %", asks, labels, theirs, pair, data, notes)


def segmented(title: str, theirs: dict[str, float], pair: Pair, data: Data, notes: list[str]) -> Table:
    """A segmenter: mean IoU and accuracies."""
    asks = "What is each pixel a part of? A segmenter that starts from these weights, every layer trained on."
    return _table(f"Segmentation, {title}", "%", asks, _SEGMENTED, theirs, pair, data, notes)


def _table(
    title: str,
    unit: str,
    asks: str,
    labels: dict[str, str],
    theirs: dict[str, float],
    pair: Pair,
    data: Data,
    notes: list[str],
) -> Table:
    rows = [_row(name, label, theirs, pair) for name, label in labels.items() if f"held_out_{name}" in pair[0]]
    first = rows[0].pretrained or rows[0].random
    counted = _COUNTED.format(classes=first.n if first else data.classes, test=data.test)
    said = ["The last step's.", *tables.choice(pair), *notes]
    return Table(title, unit, asks, rows, counted, None, tables.source(theirs), said, stands=rows[0].label)


def _row(name: str, label: str, theirs: dict[str, float], pair: Pair) -> Row:
    def get(result: dict[str, float]) -> Figure | None:
        value, of_class = result[f"held_out_{name}"], re.compile(rf"held_out_{_EACH.get(name)}_\d+")
        each = [100 * one for key, one in result.items() if of_class.fullmatch(key)]
        if math.isnan(value):  # no object of that size is there
            return None
        return over_classes(each) if each else Figure(100 * value, None, None, 0)

    return tables.row(label, theirs, pair, get, same_classes)
