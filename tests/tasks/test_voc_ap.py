"""VOC's AP against an implementation written from the devkit's text, one detection at a time."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrot.tasks.voc_ap import DETECTRON2, MMDET, Detections, Objects, average_precision, overlaps


def devkit(found, true, threshold, strict, pixel):
    """Plain Python over lists of (image, box, score) and (image, box, difficult)."""

    def iou(a, b):
        w = min(a[2], b[2]) - max(a[0], b[0]) + pixel
        h = min(a[3], b[3]) - max(a[1], b[1]) + pixel
        if w <= 0 or h <= 0:
            return 0.0
        area = [(c[2] - c[0] + pixel) * (c[3] - c[1] + pixel) for c in (a, b)]
        return w * h / (sum(area) - w * h)

    positives = sum(not difficult for _, _, difficult in true)
    used, tp, fp, points = set(), 0, 0, []
    for image, box, _ in sorted(found, key=lambda one: -one[2]):
        best, at = -1.0, None
        for number, (where, other, _) in enumerate(true):
            if where == image and iou(box, other) > best:
                best, at = iou(box, other), number
        hit = at is not None and (best > threshold if strict else best >= threshold)
        if hit and true[at][2]:
            continue
        if hit and at not in used:
            used.add(at)
            tp += 1
        else:
            fp += 1
        points.append((tp / positives, tp / (tp + fp)))
    reached = (lambda r, t: r >= t * 0.1) if strict else (lambda r, t: r > t * 0.1 - 1e-6)
    eleven = sum(max([p for r, p in points if reached(r, t)], default=0.0) for t in range(11)) / 11
    area, last = 0.0, 0.0
    for recall in sorted({r for r, _ in points if r > 0}):
        area += (recall - last) * max(p for r, p in points if r >= recall)
        last = recall
    return eleven, area


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 12), st.integers(1, 6), st.sampled_from([0.3, 0.5, 0.75]))
def test_both_rules_are_the_devkits(seed, detections, objects, threshold):
    rng = np.random.default_rng(seed)
    boxes = rng.integers(0, 12, (objects, 2))
    boxes = np.concatenate([boxes, boxes + rng.integers(2, 9, (objects, 2))], 1).astype(float)
    of = rng.integers(0, objects, detections)
    images = rng.integers(0, 3, objects)
    near = boxes[of] + rng.integers(-2, 3, (detections, 4))
    near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
    scores = rng.permutation(detections).astype(float)
    difficult = rng.random(objects) < 0.3
    found = Detections(images[of], near, scores)
    true = Objects(images, boxes, difficult)
    plain_found = list(zip(images[of].tolist(), near.tolist(), scores.tolist(), strict=True))
    plain_true = list(zip(images.tolist(), boxes.tolist(), difficult.tolist(), strict=True))
    for rule, strict, pixel in ((MMDET, False, 0.0), (DETECTRON2, True, 1.0)):
        got = average_precision(found, true, threshold, rule)
        if difficult.all():
            assert math.isnan(got.eleven) and math.isnan(got.area)
        else:
            assert (got.eleven, got.area) == pytest.approx(devkit(plain_found, plain_true, threshold, strict, pixel))


def test_an_overlap_equal_to_the_threshold_is_a_match_for_one_rule_alone():
    true = Objects(np.array([0]), np.array([[0.0, 0, 10, 10]]), np.array([False]))
    half = Detections(np.array([0]), np.array([[0.0, 0, 10, 5]]), np.array([1.0]))
    assert average_precision(half, true, 0.5, MMDET).eleven == pytest.approx(1)
    pixels = Detections(np.array([0]), np.array([[0.0, 0, 10, 4.5]]), np.array([1.0]))  # 11 * 5.5 of 11 * 11
    assert average_precision(pixels, true, 0.5, DETECTRON2).eleven == 0
    assert overlaps(np.zeros(4), np.zeros((2, 4))).tolist() == [0, 0]
