"""What detection and segmentation show: a pure function of seed, row and epoch; boxes, masks and pixels stay together."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.ops import masks_to_boxes

from conftest import draw
from fastrot.data.index import index
from fastrot.data.manifest import Manifest
from fastrot.data.objects import read_objects
from fastrot.data.whole_masks import MaskView, distorted, distortion, sides_within
from fastrot.data.whole_objects import ObjectView, sides_at

SHORTS = (48, 56, 64)


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """One image of 60 x 40 with two rectangles and a crowd."""
    folder = tmp_path_factory.mktemp("objects")
    draw(40, 60).save(folder / "a.jpg")
    corners = [(5, 6, 25, 30), (30, 10, 58, 38), (0, 0, 60, 40)]
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 60, "height": 40}],
        "categories": [{"id": 1, "name": "x"}, {"id": 2, "name": "y"}],
        "annotations": [
            {"id": at, "image_id": 1, "category_id": 1 + at % 2, "iscrowd": int(at == 2), "area": 9,
             "bbox": [a, b, c - a, d - b], "segmentation": [[a, b, c, b, c, d, a, d]]}
            for at, (a, b, c, d) in enumerate(corners)
        ],
    }  # fmt: skip
    (folder / "objects.json").write_text(json.dumps(content))
    source = f"coco:{folder / 'objects.json'}?images={folder}"
    return read_objects(Manifest.load(index(source, folder / "cache", 10**8, lambda items, *_: items)))


@settings(max_examples=40, deadline=None)
@given(epoch=st.integers(-1, 500))
def test_boxes_and_masks_go_where_the_pixels_go(objects, epoch):
    view = ObjectView(objects, 3, SHORTS, 50, 80, 0.5)
    marked = np.zeros((40, 60, 3), np.uint8)
    marked[6:30, 5:25] = 255  # the first object
    shown = view(Image.fromarray(marked), 0, epoch)
    height, width = shown.image.shape[1:]
    assert (height, width) in {sides_at((40, 60), short, 80) for short in ((50,) if epoch < 0 else SHORTS)}
    assert shown.labels.tolist() == [0, 1] and shown.masks.shape == (2, height, width)
    lit = masks_to_boxes((shown.image[:1] > 127).to(torch.uint8))[0]
    for own in (shown.boxes[0], masks_to_boxes(shown.masks)[0]):
        torch.testing.assert_close(own, lit, rtol=0, atol=1.6)
    again = view(Image.fromarray(marked), 0, epoch)
    assert torch.equal(again.image, shown.image) and torch.equal(again.boxes, shown.boxes)


def test_scales_and_flips_are_drawn_evenly_and_evaluation_draws_none(objects):
    view, image = ObjectView(objects, 3, SHORTS, 50, 120, 0.5), draw(40, 60)
    seen = [view(image, 0, epoch) for epoch in range(300)]
    sides = np.unique([one.image.shape[1] for one in seen], return_counts=True)[1]
    assert len(sides) == 3 and sides.min() > 70
    mirrored = sum(bool(one.boxes[0, 0] > one.boxes[1, 0]) for one in seen)
    assert 110 < mirrored < 190
    assert view(image, 0, -1).boxes[0, 0] < view(image, 0, -1).boxes[1, 0]


def test_the_long_side_has_a_limit():
    assert sides_at((375, 500), 800, 1333) == (800, 1067)
    assert sides_at((300, 1000), 800, 1333) == (400, 1333)
    assert sides_within((375, 500), (2048, 512)) == (512, 683)
    assert sides_within((100, 1000), (2048, 512)) == (205, 2048)


def mask_view(mask, **more):
    options = dict(base=(96, 48), scales=(0.5, 2.0), crop=32, flip=0.5, distort=False) | more
    return MaskView(lambda _row: mask, 3, **options)


@settings(max_examples=40, deadline=None)
@given(epoch=st.integers(0, 500))
def test_masks_go_where_the_pixels_go(epoch):
    mask = np.zeros((40, 60), np.uint8)
    mask[10:30, 15:40] = 1
    picture = Image.fromarray(np.repeat(mask[..., None] * 255, 3, 2))
    shown = mask_view(mask)(picture, 0, epoch)
    assert shown.image.shape[1:] == shown.mask.shape and max(shown.mask.shape) <= 32
    agree = (shown.image[0] > 127) == (shown.mask == 1)
    assert agree.float().mean() > 0.85  # but for borders, where one is smooth and the other is not


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), epoch=st.integers(0, 50))
def test_a_crop_is_not_of_one_class_where_one_of_eleven_draws_is_not(seed, epoch):
    rng = np.random.default_rng(seed)
    mask = np.kron(rng.choice(3, (4, 4), p=(0.8, 0.15, 0.05)), np.ones((16, 16))).astype(np.uint8)
    mask[rng.random(mask.shape) < 0.1] = 255

    def share(some):
        counts = np.bincount(some[some != 255])
        return counts.max() / counts.sum()

    view = mask_view(mask, base=(64, 64), scales=(1.0, 1.0), crop=24, flip=0.0)
    shown = view(Image.fromarray(np.zeros((64, 64, 3), np.uint8)), 0, epoch).mask.numpy()
    if share(shown) >= 0.75:
        from fastrot.data.randomness import PLACE, below, philox

        for attempt in range(10):
            top, left = below(philox(3, 0, epoch, PLACE, attempt)[0, :2], [41, 41])
            assert share(mask[top : top + 24, left : left + 24]) >= 0.75


def test_in_evaluation_the_mask_stays_as_it_is():
    mask = np.arange(40 * 60, dtype=np.uint8).reshape(40, 60)
    shown = mask_view(mask)(draw(40, 60), 0, -1)
    assert np.array_equal(shown.mask, mask) and shown.image.shape == (3, 48, 72) and shown.size == (40, 60)


def test_colours_are_shifted_as_the_protocol_says():
    grey = torch.full((3, 2, 2), 100, dtype=torch.uint8)
    off = np.zeros(4, bool)
    for which, by, want in (
        (0, [20, 1, 1, 0], 120),
        (0, [-120, 1, 1, 0], 0),
        (1, [0, 1.5, 1, 0], 150),
        (1, [0, 3, 1, 0], 255),
    ):
        coins = off.copy()
        coins[which] = True
        for first in (False, True):
            assert torch.equal(distorted(grey, coins, first, np.array(by, float)), torch.full_like(grey, want))
    red = torch.zeros(3, 1, 1, dtype=torch.uint8)
    red[0] = 200
    turned = distorted(red, np.array([0, 0, 0, 1], bool), True, np.array([0, 1, 1, 60.0]))
    assert turned.flatten().tolist() == [0, 200, 0]  # 120 degrees on: green
    pale = distorted(red, np.array([0, 0, 1, 0], bool), True, np.array([0, 1, 0.5, 0]))
    assert pale.flatten().tolist() == pytest.approx([200, 100, 100], abs=1)
    drawn = [distortion(1, 0, epoch) for epoch in range(400)]
    amounts = np.stack([by for _, _, by in drawn])
    assert amounts.min(0) == pytest.approx([-32, 0.5, 0.5, -18], abs=0.6)
    assert amounts.max(0) == pytest.approx([32, 1.5, 1.5, 17], abs=0.6)
    assert all(150 < n < 250 for n in np.stack([coins for coins, _, _ in drawn]).sum(0))
