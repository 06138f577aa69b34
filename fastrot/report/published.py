"""The published figures of rotation prediction, ResNet-50, in percent, and the tasks they were measured on.

MMSelfSup 0.11 (configs/selfsup/rotation_pred/README.md and its benchmark pages); semi-supervised: OpenSelfSup
(docs/MODEL_ZOO.md), of another checkpoint.
"""

from dataclasses import dataclass

SOURCE = "MMSelfSup 0.11, ResNet-50"
OPENSELFSUP = "OpenSelfSup, ResNet-50"
MIXED = (
    "The published row very probably mixes two checkpoints, so no single one need match all of it: its SVM, low-shot, "
    "feature1 to feature5, detection and segmentation figures have stood unchanged since MMSelfSup 0.5, whose loader "
    "gave BGR to networks for RGB; after that was mended AvgPool moved from 44.35 to 48.12, and Places205 and k-NN "
    "were added."
)

Rows = dict[str, float]


@dataclass(frozen=True)
class Task:
    """What a data set's figures were measured on: classes, images to learn from and to judge by, and their side: of crops,
    or in detection the short one."""

    name: str
    classes: int
    train: int
    test: int
    side: int = 224

    def differs(self, classes: int, train: int, test: int, side: int) -> str | None:
        """Why figures of these data are not comparable with the published ones; None where they are.

        One image in a hundred may be missing: damaged files are left out.
        """
        known = (
            ("classes", self.classes, classes, 0.0),
            ("images to learn from", self.train, train, 0.01),
            ("to judge by", self.test, test, 0.01),
            ("pixels a side", self.side, side, 0.0),
        )
        off = [f"{a:,} {what} (here {b:,})" for what, a, b, missing in known if abs(a - b) > missing * a]
        return f"another task: {self.name} has {', '.join(off)}" if off else None


# SimCLR's lists have 12,811 and 128,116 images
TASKS = {
    "voc07": Task("Pascal VOC07 (trainval, test)", 20, 5011, 4952),
    "imagenet": Task("ImageNet", 1000, 1_281_167, 50_000),
    "places205": Task("Places205", 205, 2_448_873, 20_500),
    "semi_1": Task("1 % of ImageNet", 1000, 12_811, 50_000),
    "semi_10": Task("10 % of ImageNet", 1000, 128_116, 50_000),
    "detect_voc0712": Task("Pascal VOC07+12 (trainval, test of 07)", 20, 16_551, 4952, 800),
    "detect_coco": Task("COCO 2017", 80, 118_287, 5000, 800),
    "segment_voc12aug": Task("Pascal VOC12 with SBD's masks", 21, 10_582, 1449, 512),
}

SVM: dict[str, Rows] = {"voc07": {"feature4": 67.70}}  # only the best layer was published
LOW_SHOT: dict[str, Rows] = {
    "voc07": {
        f"k = {k}": value
        for k, value in zip(
            (1, 2, 4, 8, 16, 32, 64, 96), (20.60, 24.35, 31.41, 39.17, 46.56, 53.37, 59.14, 62.42), strict=True
        )
    }
}
LINEAR: dict[str, Rows] = {
    "imagenet": {
        "feature1": 12.15,
        "feature2": 31.99,
        "feature3": 44.57,
        "feature4": 54.20,
        "feature5": 45.94,
        "avg": 48.12,
    },
    "places205": {"feature1": 18.94, "feature2": 34.72, "feature3": 44.53, "feature4": 46.30, "feature5": 44.12},
}
KNN: dict[str, Rows] = {
    "imagenet": {"avg, k = 10": 11.0, "avg, k = 20": 11.9, "avg, k = 100": 12.6, "avg, k = 200": 12.4}
}
SEMI: dict[str, Rows] = {  # OpenSelfSup's
    "semi_1": {"top-1": 18.98, "top-5": 44.05},
    "semi_10": {"top-1": 54.75, "top-5": 80.21},
}
DETECT: dict[str, Rows] = {
    "detect_voc0712": {"AP50": 79.67},
    "detect_coco": {
        "box AP": 37.9,
        "box AP50": 56.5,
        "box AP75": 41.5,
        "mask AP": 34.2,
        "mask AP50": 53.9,
        "mask AP75": 36.7,
    },
}
SEGMENT: dict[str, Rows] = {"segment_voc12aug": {"mean IoU": 64.31}}  # of Cityscapes none is published
