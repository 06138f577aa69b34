"""Segmentation's task: padded pixels teach nothing, windows are averaged, figures are of the masks as they are."""

import numpy as np
import pytest
import torch
import torchvision
from torch.nn import functional as F

from fastrot.data.whole import WholeBatch
from fastrot.data.whole_masks import ShownMask
from fastrot.models.segmenter import segmentation_loss
from fastrot.tasks.confusion import figures
from fastrot.tasks.segment import SegmentTask

MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
CPU = torch.device("cpu")


def task(**more):
    options = dict(classes=4, crop=32, slide=None, align_corners=False, mean=MEAN, std=STD, device=CPU) | more
    return SegmentTask(torchvision.models.resnet18(), **options)


def shown(height, width, size=None):
    rng = torch.Generator().manual_seed(height)
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=rng)
    mask = torch.randint(0, 4, size or (height, width), dtype=torch.uint8, generator=rng)
    return ShownMask(image, mask, size or (height, width))


def test_every_layer_of_a_frozen_backbone_learns():
    backbone = torchvision.models.resnet18().requires_grad_(False)
    network = SegmentTask(backbone, 4, 32, None, False, MEAN, STD, CPU).build_model("resnet18", 0)
    assert all(p.requires_grad for p in network.parameters())


def test_crops_are_padded_and_padding_is_no_class():
    one = task()
    batch = WholeBatch(np.arange(2), [shown(32, 32), shown(20, 28)], 2, True)
    views = one.views(batch)
    assert views.shape == (2, 3, 32, 32) and (views[1, :, 20:] == 0).all() and (views[1, :, :, 28:] == 0).all()
    torch.testing.assert_close(
        views[1, :, :20, :28], torchvision.transforms.functional.normalize(batch.samples[1].image.float(), MEAN, STD)
    )
    logits = (torch.randn(2, 4, 32, 32), torch.randn(2, 4, 32, 32))
    loss, sums = one.loss(lambda _: logits, views, batch)
    target = torch.full((2, 32, 32), 255)
    target[0], target[1, :20, :28] = batch.samples[0].mask, batch.samples[1].mask
    torch.testing.assert_close(loss, 2 * segmentation_loss(logits, target))
    right = (logits[0].argmax(1) == target).sum().item()
    assert one.summary(sums) == pytest.approx({"loss": loss.item() / 2, "accuracy": right / (1024 + 560)})


def test_a_whole_image_is_judged_at_its_own_size():
    one = task()

    def says(x):
        return (torch.stack([x[:, 0], x[:, 1], x[:, 2], x[:, 0] * 0 - 9], 1),)

    sample = shown(40, 60, (20, 30))
    matrix = one.evaluate(says, [WholeBatch(np.array([0]), [sample], 1, False)])
    x = torchvision.transforms.functional.normalize(sample.image.float(), MEAN, STD)[None]
    want = F.interpolate(says(x)[0], (20, 30), mode="bilinear").argmax(1)[0]
    assert matrix.sum() == 600 and matrix.diagonal().sum() == (want == sample.mask).sum()
    assert 0 < figures(matrix).mean_iou < 1


@pytest.mark.parametrize("height, width", [(50, 70), (32, 32), (20, 40), (33, 64)])
def test_sliding_windows_are_averaged_where_they_meet(height, width):
    one = task(slide=(32, 20))
    seen = []

    def says(x):
        seen.append(tuple(x.shape[-2:]))
        level = torch.full((1, 1, *x.shape[-2:]), float(len(seen)))
        return (torch.cat([level, level * 0, level * 0, x[:, :1]], 1),)

    got = one._slid(says, torch.zeros(1, 3, height, width), 32, 20)
    total, times, number = torch.zeros(height, width), torch.zeros(height, width), 0
    for row in range(max(height - 32 + 19, 0) // 20 + 1):  # mmsegmentation's slide_inference
        for column in range(max(width - 32 + 19, 0) // 20 + 1):
            bottom, right = min(row * 20 + 32, height), min(column * 20 + 32, width)
            top, left, number = max(bottom - 32, 0), max(right - 32, 0), number + 1
            total[top:bottom, left:right] += number
            times[top:bottom, left:right] += 1
    torch.testing.assert_close(got[0, 0], total / times)
    assert len(seen) == number
