"""Detectors: the protocol's numbers, and losses equal to an independent composition."""

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torchvision.ops import box_iou
from torchvision.ops.poolers import MultiScaleRoIAlign

from fastrot.models.detector import AlignedPool, Anchors, FloorMatcher, faster_rcnn_c4, mask_rcnn_fpn
from fastrot.models.over_ranks import Group
from fastrot.models.sync_batchnorm import SyncBatchNorm2d, synchronise_batchnorm

CONV4 = 8_543_296  # ResNet-50's stem and stages 1 to 3
STAGE4 = 14_964_736
SIDES = (32, 64, 128, 256, 512)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.fixture(scope="module")
def c4():
    return faster_rcnn_c4(torchvision.models.resnet50(), 20)


@pytest.fixture(scope="module")
def fpn():
    return mask_rcnn_fpn(torchvision.models.resnet50(), 80)


def test_c4_has_the_layers_of_the_protocol(c4):
    rpn = 1024 * 1024 * 9 + 1024 + 15 * 1025 + 60 * 1025
    assert parameters(c4) == CONV4 + STAGE4 + 2 * 2048 + rpn + 21 * 2049 + 80 * 2049
    features = c4.backbone(torch.zeros(1, 3, 64, 96))
    assert [tuple(one.shape) for one in features.values()] == [(1, 1024, 4, 6)]  # stride 16
    assert c4.roi_heads.box_head(torch.zeros(2, 1024, 14, 14)).shape == (2, 2048)
    assert c4.roi_heads.box_head.layer4[0].conv2.stride == (2, 2)
    rpn, heads = c4.rpn, c4.roi_heads
    assert (rpn._pre_nms_top_n, rpn._post_nms_top_n) == (
        {"training": 12000, "testing": 6000},
        {"training": 2000, "testing": 1000},
    )
    assert (rpn.nms_thresh, rpn.fg_bg_sampler.batch_size_per_image, rpn.fg_bg_sampler.positive_fraction) == (
        0.7,
        256,
        0.5,
    )
    assert (heads.fg_bg_sampler.batch_size_per_image, heads.fg_bg_sampler.positive_fraction) == (512, 0.25)
    assert (heads.score_thresh, heads.nms_thresh, heads.detections_per_img) == (0.05, 0.5, 100)
    assert heads.box_coder.weights == (10, 10, 5, 5) and rpn.box_coder.weights == (1, 1, 1, 1)


def test_fpn_has_the_layers_of_the_protocol(fpn):
    conv, lateral = 256 * 256 * 9, sum((256, 512, 1024, 2048)) * 256
    pyramid = lateral + 4 * conv + 8 * 2 * 256
    rpn = conv + 256 + 3 * 257 + 12 * 257
    box = 4 * (conv + 512) + 256 * 49 * 1024 + 1024 + 81 * 1025 + 320 * 1025
    mask = 4 * (conv + 512) + 256 * 256 * 4 + 256 + 80 * 257
    assert parameters(fpn) == CONV4 + STAGE4 + pyramid + rpn + box + mask
    levels = fpn.backbone(torch.zeros(1, 3, 128, 160))
    assert [tuple(one.shape[1:]) for one in levels.values()] == [
        (256, 32, 40), (256, 16, 20), (256, 8, 10), (256, 4, 5), (256, 2, 3),
    ]  # fmt: skip
    assert fpn.rpn.anchor_generator.num_anchors_per_location() == [3] * 5
    synchronise_batchnorm(fpn, Group("all", 2))
    norms = [type(m) for m in fpn.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert set(norms) == {SyncBatchNorm2d} and len(norms) == 53 + 8 + 4 + 4
    assert all(p.requires_grad for p in fpn.parameters())


def test_a_backbones_weights_are_those_of_the_detector(c4):
    resnet = torchvision.models.resnet50()
    model = faster_rcnn_c4(resnet, 20)
    assert model.backbone.body["conv1"].weight is resnet.conv1.weight
    assert model.roi_heads.box_head.layer4 is resnet.layer4


@pytest.mark.parametrize("sides, strides", [((SIDES,), (16,)), (tuple((s,) for s in SIDES), (4, 8, 16, 32, 64))])
def test_anchors_are_the_protocols_at_whole_strides_and_not_rounded(sides, strides):
    height, width = 96, 160
    maps = [torch.zeros(1, 1, -(-height // s), -(-width // s)) for s in strides]
    images = torchvision.models.detection.image_list.ImageList(torch.zeros(1, 3, height, width), [(height, width)])
    (got,) = Anchors(sides, strides)(images, maps)
    want = []
    for scale, stride, of in zip(sides, strides, maps, strict=True):
        for y in range(of.shape[2]):
            for x in range(of.shape[3]):
                for ratio in (0.5, 1, 2):
                    for side in scale:
                        w, h = side / ratio**0.5, side * ratio**0.5
                        want.append((x * stride - w / 2, y * stride - h / 2, x * stride + w / 2, y * stride + h / 2))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def assigned(iou, high, low, floor):
    """mmdetection's MaxIoUAssigner, an anchor and an object at a time; -1 background, -2 neither."""
    out = []
    for at in range(iou.shape[1]):
        best = iou[:, at].max()
        out.append(int(iou[:, at].argmax()) if best >= high else -1 if best < low else -2)
    for box in range(iou.shape[0]):
        if iou[box].max() >= floor:
            for at in np.flatnonzero(iou[box] == iou[box].max()):
                out[at] = box
    return out


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.integers(1, 12), st.integers(0, 2**31))
def test_objects_take_their_best_candidates_as_the_protocol_says(objects, anchors, seed):
    iou = np.random.default_rng(seed).integers(0, 11, (objects, anchors)) / 10
    got = FloorMatcher(0.7, 0.3, 0.3)(torch.from_numpy(iou))
    assert got.tolist() == assigned(iou, 0.7, 0.3, 0.3)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31))
def test_boxes_are_read_at_the_level_of_their_size(seed):
    rng = torch.Generator().manual_seed(seed)
    names, strides = ("a", "b", "c", "d"), (4, 8, 16, 32)
    features = {n: torch.randn(2, 3, 512 // s, 512 // s, generator=rng) for n, s in zip(names, strides, strict=True)}
    boxes = [torch.rand(5, 4, generator=rng) * 200 for _ in range(2)]
    for of in boxes:
        of[:, 2:] += of[:, :2] + 1
    got = AlignedPool(names, 7, strides)(features, boxes, None)
    judge = MultiScaleRoIAlign(list(names), 7, -1)
    judge.scales, judge.map_levels = torchvision.ops.poolers._setup_scales(
        list(features.values()), [(512, 512)] * 2, 224, 4
    )
    levels = judge.map_levels(boxes)
    for at, level in enumerate(levels.tolist()):
        image, box = at // 5, boxes[at // 5][at % 5]
        want = torchvision.ops.roi_align(
            features[names[level]][image : image + 1], [box[None]], 7, 1 / strides[level], -1, aligned=True
        )
        torch.testing.assert_close(got[at], want[0])


def deltas_of(objects, anchors, weights):
    a, o = ((torch.cat([(b[:, :2] + b[:, 2:]) / 2, b[:, 2:] - b[:, :2]], 1)) for b in (anchors, objects))
    return torch.cat([(o[:, :2] - a[:, :2]) / a[:, 2:], (o[:, 2:] / a[:, 2:]).log()], 1) * torch.tensor(weights)


def test_losses_of_a_fixed_batch_are_those_of_plain_functions():
    torch.manual_seed(0)
    model = mask_rcnn_fpn(torchvision.models.resnet18(), 3, 16).train()
    images = [torch.randn(3, 128, 160), torch.randn(3, 96, 128)]
    targets = []
    for image in images:
        boxes = torch.tensor([[10.0, 12, 60, 70], [30, 40, 90, 90]])
        masks = torch.zeros(2, *image.shape[1:], dtype=torch.uint8)
        masks[0, 12:50, 10:60], masks[1, 40:90, 30:70] = 1, 1
        targets.append({"boxes": boxes, "labels": torch.tensor([1, 3]), "masks": masks})
    seen = {}
    model.rpn.head.register_forward_hook(lambda _, __, out: seen.update(rpn=out))
    model.rpn.register_forward_hook(lambda _, __, out: seen.update(proposals=out[0]))
    model.roi_heads.box_predictor.register_forward_hook(lambda _, __, out: seen.update(box=out))
    model.roi_heads.mask_predictor.register_forward_hook(lambda _, __, out: seen.update(mask=out))
    torch.manual_seed(1)
    got = model(images, targets)

    torch.manual_seed(1)  # the same draws of anchors, then of regions
    padded = torchvision.models.detection.image_list.ImageList(torch.zeros(2, 3, 128, 160), [(128, 160), (96, 128)])
    anchors = model.rpn.anchor_generator(padded, seen["rpn"][0])[0]
    scores = torch.cat([one.permute(0, 2, 3, 1).reshape(2, -1) for one in seen["rpn"][0]], 1)
    deltas = torch.cat([one.permute(0, 2, 3, 1).reshape(2, -1, 4) for one in seen["rpn"][1]], 1)
    labels = [torch.tensor(assigned(box_iou(t["boxes"], anchors).numpy(), 0.7, 0.3, 0.3)) for t in targets]
    chosen = model.rpn.fg_bg_sampler(
        [torch.where(of >= 0, 1.0, of.float()).where(of != -1, 0.0).where(of != -2, -1.0) for of in labels]
    )
    count = sum(int((p | n).sum()) for p, n in zip(*chosen, strict=True))
    score = box = 0.0
    for image, (positive, negative) in enumerate(zip(*chosen, strict=True)):
        positive, negative = positive.bool(), negative.bool()
        score += F.softplus(-scores[image][positive]).sum() + F.softplus(scores[image][negative]).sum()
        wanted = deltas_of(targets[image]["boxes"][labels[image][positive]], anchors[positive], (1.0, 1, 1, 1))
        box += (deltas[image][positive] - wanted).abs().sum()
    torch.testing.assert_close(got["loss_objectness"], score / count)
    torch.testing.assert_close(got["loss_rpn_box_reg"], box / count)

    regions = [torch.cat([p, t["boxes"]]) for p, t in zip(seen["proposals"], targets, strict=True)]
    which = [
        torch.tensor(assigned(box_iou(t["boxes"], r).numpy(), 0.5, 0.5, 0.5))
        for t, r in zip(targets, regions, strict=True)
    ]
    classes = [torch.where(w >= 0, t["labels"][w.clamp(0)], 0) for w, t in zip(which, targets, strict=True)]
    taken = [torch.where(p.bool() | n.bool())[0] for p, n in zip(*model.roi_heads.fg_bg_sampler(classes), strict=True)]
    label = torch.cat([c[t] for c, t in zip(classes, taken, strict=True)])
    logits, regression = seen["box"]
    torch.testing.assert_close(got["loss_classifier"], -logits.log_softmax(1)[torch.arange(len(label)), label].mean())
    wanted = torch.cat(
        [
            deltas_of(t["boxes"][w[i].clamp(0)], r[i], (10.0, 10, 5, 5))
            for t, w, i, r in zip(targets, which, taken, regions, strict=True)
        ]
    )
    mine = torch.stack([regression[i, 4 * c : 4 * c + 4] for i, c in enumerate(label.tolist())])
    apart = (mine - wanted).abs().sum(1)[label > 0].sum()
    torch.testing.assert_close(got["loss_box_reg"], apart / len(label))

    cells, at = [], 0
    for t, w, i, r in zip(targets, which, taken, regions, strict=True):
        for region in i.tolist():
            if w[region] >= 0:
                own = t["masks"][w[region]][None, None].float()
                cell = torchvision.ops.roi_align(own, [r[region][None]], 28, 1.0, -1, aligned=True)[0, 0] >= 0.5
                cells.append(F.binary_cross_entropy_with_logits(seen["mask"][at, t["labels"][w[region]]], cell.float()))
                at += 1
    assert at == int((label > 0).sum()) > 0
    torch.testing.assert_close(got["loss_mask"], torch.stack(cells).mean())


def test_an_image_without_objects_is_background_alone_and_no_loss_is_nan():
    model = mask_rcnn_fpn(torchvision.models.resnet18(), 3, 16).train()
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "masks": torch.zeros(0, 64, 64)}
    losses = model([torch.randn(3, 64, 64)], [empty])
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert losses["loss_box_reg"] == losses["loss_rpn_box_reg"] == losses["loss_mask"] == 0
    sum(losses.values()).backward()


def test_anchors_that_cross_the_border_have_no_target_in_c4():
    model = faster_rcnn_c4(torchvision.models.resnet18(), 3)
    model.rpn._sizes = [(64, 64)]
    anchors = torch.tensor([[0.0, 0, 32, 32], [-1, 0, 31, 32], [10, 10, 64, 50], [20, 20, 63, 63]])
    target = {"boxes": torch.tensor([[-1.0, 0, 31, 32]]), "labels": torch.tensor([1])}
    labels, _ = model.rpn.assign_targets_to_anchors([anchors], [target])
    assert labels[0].tolist() == [1, -1, -1, 0]


@pytest.mark.parametrize("build", [faster_rcnn_c4, pytest.param(mask_rcnn_fpn, marks=pytest.mark.slow)])
def test_under_autocast_boxes_stay_fp32(build):
    torch.manual_seed(0)
    model, seen = build(torchvision.models.resnet18(), 3, 16), {}
    model.rpn.anchor_generator.register_forward_hook(lambda _, __, out: seen.update(anchors=out))
    model.rpn.register_forward_hook(lambda _, __, out: seen.update(proposals=out[0]))
    model.roi_heads.score_thresh = 0.0
    masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
    target = {"boxes": torch.tensor([[10.0, 12, 40, 50]]), "labels": torch.tensor([1]), "masks": masks}
    with torch.autocast("cpu", torch.bfloat16):
        losses = model([torch.randn(3, 64, 64)], [target])
        (found,) = model.eval()([torch.randn(3, 64, 64)])
    sum(losses.values()).backward()
    every = [*losses.values(), *seen["anchors"], *seen["proposals"], found["boxes"], found["scores"]]
    assert len(found["boxes"]) and {one.dtype for one in every} == {torch.float32}


def test_regions_of_bf16_maps_are_read_where_they_lie():
    ramp = (torch.arange(300.0) - 250).expand(1, 1, 8, 300)  # its column, exact in bf16 about the region
    region = [torch.tensor([[1001.7, 0, 1029.7, 28]])]  # in bf16 it would be 1000 to 1032
    with torch.autocast("cpu", torch.bfloat16):
        read = AlignedPool(("a",), 7, (4,))({"a": ramp.bfloat16()}, region, None)
    want = torch.arange(7) + 1001.7 / 4 - 250
    assert read.dtype == torch.bfloat16
    np.testing.assert_allclose(read[0, 0, 3].float(), want, atol=0.02)
