"""Taps and pools against a plain ResNet run by hand."""

import pytest
import torch
from torch.nn import functional as F

from fastrot.errors import UserError
from fastrot.models.resnet import build_model
from fastrot.models.taps import ADAPTIVE, AVERAGE, SPECIFIED, TAPS, flat_features, pooled_maps


@pytest.mark.parametrize(
    "arch, channels", [("resnet18", (64, 64, 128, 256, 512)), ("resnet50", (64, 256, 512, 1024, 2048))]
)
def test_pools_have_the_protocols_sizes(arch, channels):
    model = build_model(arch, 1, 0).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        maps = {pool: pooled_maps(model, images, (*TAPS, AVERAGE), pool) for pool in ("specified", "adaptive", "gap")}
    for tap, c, side in zip(TAPS, channels, (12, 6, 4, 3, 2), strict=True):
        assert maps["specified"][tap].shape == (1, c, side, side)
        assert maps["adaptive"][tap].shape == (1, c, side, side)
        assert maps["gap"][tap].shape == (1, c, 1, 1)
    assert torch.equal(maps["specified"][AVERAGE], maps["gap"]["feature5"])


def test_feature1_is_read_before_the_maxpool_and_counts_its_padding():
    model = build_model("resnet18", 1, 0).eval()
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        got = flat_features(model, images, ("feature1",), "specified")["feature1"].view(2, 64, 12, 12)
        stem = torch.relu(F.conv2d(images, model.conv1.weight, stride=2, padding=3) / (1 + 1e-5) ** 0.5)
    torch.testing.assert_close(got[:, :, 0, 0], stem[:, :, :6, :6].sum((2, 3)) / 100)
    torch.testing.assert_close(got[:, :, 3, 5], stem[:, :, 26:36, 46:56].mean((2, 3)))


def test_the_specified_pools_numbers():
    """Kernel, stride, padding of each tap in mmselfsup's configs; several paddings give the same size."""
    assert SPECIFIED == ((10, 10, 4), (16, 8, 0), (13, 5, 0), (8, 3, 0), (6, 1, 0))
    assert ADAPTIVE == (12, 6, 4, 3, 2)


def test_features_are_flattened_channel_first():
    model = build_model("resnet18", 1, 0).eval().to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        maps = pooled_maps(model, images, TAPS, "specified")
        rows = flat_features(model, images, TAPS, "specified")
    for tap in TAPS:
        assert torch.equal(rows[tap], maps[tap].contiguous().reshape(2, -1))


def test_small_images_have_no_specified_pool():
    with pytest.raises(UserError, match="pool specified is for images of 224"), torch.no_grad():
        flat_features(build_model("resnet18", 1, 0), torch.zeros(1, 3, 64, 64), TAPS, "specified")
