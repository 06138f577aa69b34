"""The stem's norm, ReLU and max-pool as one function, against torch's own modules."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, ResNet

from fastrot.models.fused_norm import FusedNorm2d, fuse_norms
from fastrot.models.resnet import tap_maps
from workers.narrow import NarrowResNet

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def stems(device):
    """(a network of torch's modules, one whose norms are fused) with the same weights."""
    torch.manual_seed(0)
    plain = ResNet(BasicBlock, [1, 1, 1, 1])
    nn.init.uniform_(plain.bn1.weight, -1.0, 1.5)
    nn.init.normal_(plain.bn1.bias)
    return plain.to(device), fuse_norms(copy.deepcopy(plain), over_ranks=None).to(device)


def passed(model, x, dy):
    leaf = x.clone().requires_grad_()
    if isinstance(model.bn1, FusedNorm2d):
        out = model.bn1(leaf, maxpool=model.maxpool)
    else:
        out = model.maxpool(F.relu(model.bn1(leaf)))
    out.backward(dy)
    return {"out": out.detach(), "dx": leaf.grad, "dw": model.bn1.weight.grad, "db": model.bn1.bias.grad}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_stem_is_no_farther_from_float64_than_torchs_modules(device, dtype, layout):
    plain, ours = stems(device)
    x = (torch.randn(4, 64, 15, 12) * 2 + 1).to(device, dtype).to(memory_format=layout)
    dy = torch.randn(4, 64, 8, 6).to(device, dtype)
    exact = passed(copy.deepcopy(plain).double(), x.double(), dy.double())
    want, got = passed(plain, x, dy), passed(ours, x, dy)
    assert got["out"].is_contiguous(memory_format=torch.channels_last)
    for name, right in exact.items():
        far = [(values[name].double() - right).norm() for values in (want, got)]
        assert (got[name].dtype, got[name].shape) == (want[name].dtype, want[name].shape), name
        # among values that bfloat16 holds as equal the first wins, in both; torch rounds the norm before the ReLU too
        assert far[1] <= 1.5 * far[0] + 1e-6 * right.norm(), name
    for name, value in plain.bn1.named_buffers():
        torch.testing.assert_close(dict(ours.bn1.named_buffers())[name], value, rtol=1e-4, atol=1e-5)
    plain.eval(), ours.eval()
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    for name, value in passed(plain, x, dy).items():
        if name in ("out", "dx"):
            torch.testing.assert_close(passed(ours, x, dy)[name], value, **near)


def test_the_normalised_map_is_not_kept():
    """But the convolution's result, and of each window a value and a byte."""
    _, model = stems("cpu")
    held, x = {}, torch.randn(2, 64, 32, 32).to(memory_format=torch.channels_last).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.setdefault(t.data_ptr(), t), lambda t: t):
        out = model.bn1(x, maxpool=model.maxpool)
    kept = sum(t.nbytes for t in held.values())
    assert kept == x.nbytes + out.nbytes + out.numel() + (2 + 3) * 64 * 4


@pytest.mark.parametrize("kind", [lambda: ResNet(BasicBlock, [1, 1, 1, 1]), NarrowResNet])
@pytest.mark.parametrize("training", [True, False])
def test_probes_read_the_map_before_the_pool(kind, training):
    plain = kind().train(training)
    fused = fuse_norms(copy.deepcopy(plain), over_ranks=None)
    assert isinstance(fused, type(plain)) and fused.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(4, 3, 32, 32)
    for ours, want in zip(tap_maps(fused, x), tap_maps(plain, x), strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-3, atol=1e-3)


def test_another_pool_stays_what_it_was():
    plain = ResNet(BasicBlock, [1, 1, 1, 1])
    plain.maxpool = nn.MaxPool2d(2)
    fused = fuse_norms(copy.deepcopy(plain), over_ranks=None)
    x = torch.randn(4, 3, 32, 32)
    assert type(fused) is ResNet
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-3, atol=1e-3)
