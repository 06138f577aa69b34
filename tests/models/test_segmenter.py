"""The segmenter: contracted dilation as torchvision's own, layers as the protocol says, losses as plain functions."""

import torch
import torchvision
from torch.nn import functional as F

from fastrot.models.segmenter import Segmenter, dilate, segmentation_loss


def test_a_dilated_backbone_is_torchvisions_with_the_same_weights():
    plain = torchvision.models.resnet50().eval()
    theirs = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True]).eval()
    theirs.load_state_dict(plain.state_dict())
    images = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(dilate(plain)(images), theirs(images))
    assert plain.layer4[0].conv2.dilation == (2, 2) and plain.layer4[1].conv2.dilation == (4, 4)


def test_heads_have_the_protocols_layers():
    model = Segmenter(torchvision.models.resnet50(num_classes=1), 21, False)
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert count["head"] == 9 * 512 * (2048 + 512 + 2560) + 3 * 2 * 512 + 513 * 21
    assert count["auxiliary"] == 9 * 1024 * 256 + 2 * 256 + 257 * 21
    maps = {}
    model.head.register_forward_hook(lambda _, __, out: maps.update(head=out.shape))
    model.train()
    logits = model(torch.randn(2, 3, 64, 96))
    assert maps["head"] == (2, 21, 8, 12)  # output stride 8
    assert [one.shape for one in logits] == [(2, 21, 64, 96)] * 2
    assert len(model.eval()(torch.randn(1, 3, 32, 32))) == 1


def test_the_loss_is_a_mean_over_all_pixels_and_the_auxiliarys_weighs_less():
    logits = tuple(torch.randn(2, 5, 6, 7) for _ in range(2))
    target = torch.randint(0, 5, (2, 6, 7))
    target[0, :3] = 255
    each = []
    for one in logits:
        rows = one.permute(0, 2, 3, 1).reshape(-1, 5).log_softmax(1)
        flat = target.reshape(-1)
        each.append(-rows[flat != 255].gather(1, flat[flat != 255][:, None]).sum() / flat.numel())
    torch.testing.assert_close(segmentation_loss(logits, target), each[0] + 0.4 * each[1])
    torch.testing.assert_close(segmentation_loss(logits[:1], target), each[0])
    assert F.cross_entropy(logits[0], target, ignore_index=255) > segmentation_loss(logits[:1], target)
