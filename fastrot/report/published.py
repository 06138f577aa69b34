"""The published figures of rotation prediction, ResNet-50; percent. Where nobody published one: None.

MMSelfSup 0.11 (configs/selfsup/rotation_pred/README.md and its benchmark pages); semi-supervised: OpenSelfSup
(docs/MODEL_ZOO.md), of another checkpoint.
"""

SOURCE = "MMSelfSup 0.11, ResNet-50"
OPENSELFSUP = "OpenSelfSup, ResNet-50"

SVM = {"voc07": {"feature4": 67.70}}  # only the best layer was published
LOW_SHOT = {
    "voc07": {1: 20.60, 2: 24.35, 4: 31.41, 8: 39.17, 16: 46.56, 32: 53.37, 64: 59.14, 96: 62.42},
}
LINEAR = {
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
KNN = {"imagenet": {10: 11.0, 20: 11.9, 100: 12.6, 200: 12.4}}

SEMI = {"semi_1": (18.98, 44.05), "semi_10": (54.75, 80.21)}  # OpenSelfSup's: top-1, top-5

# Tables that no probe of the suite fills: title, unit, source, and (row, figure).
ELSEWHERE = (
    ("Detection, VOC07+12, Faster R-CNN C4, 24k", "AP50", SOURCE, (("AP50", 79.67),)),
    (
        "Detection, COCO 2017, Mask R-CNN FPN, 1x",
        "AP",
        SOURCE,
        (
            ("box AP", 37.9),
            ("box AP50", 56.5),
            ("box AP75", 41.5),
            ("mask AP", 34.2),
            ("mask AP50", 53.9),
            ("mask AP75", 36.7),
        ),
    ),
    ("Segmentation, VOC12aug, FCN, 20k", "mIoU", SOURCE, (("mIoU", 64.31),)),
    ("Segmentation, Cityscapes, FCN, 40k", "mIoU", SOURCE, (("mIoU", None),)),
)
