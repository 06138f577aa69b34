"""The network against the protocol; batch norm over ranks against one big batch (also test_engine)."""

import math

import pytest
import torch
import torch.distributed as dist
import torchvision

from fastrot import distributed
from fastrot.data.loader import MicroBatch
from fastrot.models.over_ranks import Group
from fastrot.models.resnet import backbone_state, build_model, pad_stem, tap_maps
from fastrot.models.sync_batchnorm import _local_statistics, _SyncedNorm
from fastrot.tasks.rotation import RotationTask


@pytest.mark.parametrize(
    "arch, parameters", [("resnet18", 11_178_564), ("resnet34", 21_286_724), ("resnet50", 23_516_228)]
)
def test_sizes_are_torchvisions_with_four_classes(arch, parameters):
    model = build_model(arch, 4, 0)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.state_dict().keys() == getattr(torchvision.models, arch)().state_dict().keys()


def test_weights_are_drawn_as_the_protocol_says():
    model = build_model("resnet50", 4, 7)
    for name, p in model.named_parameters():
        if p.ndim == 4:  # Kaiming normal, fan out, ReLU
            want = math.sqrt(2 / (p.shape[0] * p.shape[2] * p.shape[3]))
            assert p.std().item() == pytest.approx(want, rel=0.05), name
            assert abs(p.mean().item()) < 0.05 * want + 3 * want / math.sqrt(p.numel()), name
        elif name == "fc.weight":
            assert p.std().item() == pytest.approx(0.01, rel=0.05)
        elif name.endswith("weight"):
            assert torch.all(p == 1), f"{name}: no zero-initialised residuals"
        else:
            assert torch.all(p == 0), name


def test_the_seed_decides_the_weights_and_nothing_else_is_drawn():
    before = torch.random.get_rng_state()
    a, b, c = build_model("resnet18", 4, 1), build_model("resnet18", 4, 1), build_model("resnet18", 4, 2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(a.conv1.weight, b.conv1.weight)
    assert not torch.equal(a.conv1.weight, c.conv1.weight)


def test_taps_have_the_protocols_shapes_and_lead_to_the_models_output():
    model = build_model("resnet50", 4, 0).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        maps = tap_maps(model, images)
        logits = model.fc(model.avgpool(maps[-1]).flatten(1))
        torch.testing.assert_close(logits, model(images))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (64, 112, 112),
        (256, 56, 56),
        (512, 28, 28),
        (1024, 14, 14),
        (2048, 7, 7),
    ]
    assert all(m.min() >= 0 for m in maps)


def test_a_constant_channel_has_no_variance_rather_than_an_infinite_one():
    x = torch.randn(4, 2, 3, 3)
    x[:, 1] = 5.0
    mean, var = _local_statistics(x, torch.ones(2), torch.zeros(2), 1e-5)
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(var, x.var((0, 2, 3), correction=0), rtol=1e-4, atol=1e-6)


@pytest.fixture
def alone():
    """A process group of one."""
    distributed.start()
    yield
    distributed.end()


@pytest.mark.parametrize("dtype, rms, mean", [(torch.float32, 1e-6, 1e-7), (torch.bfloat16, 5e-4, 2e-5)])
def test_synchronised_norm_is_as_exact_as_torchs_own(alone, dtype, rms, mean):
    """Output and gradients against float64 batch norm; no bias may hide in a channel's mean gradient."""
    torch.manual_seed(0)
    x = (torch.randn(64, 16, 14, 14) * 3 + 1).to(memory_format=torch.channels_last).to(dtype)
    dy = (torch.randn_like(x.float()) * 0.1 + 0.02).to(dtype)
    weight, bias = torch.rand(16) + 0.5, torch.randn(16)
    ours = [t.clone().requires_grad_() for t in (x, weight, bias)]
    out, *_ = _SyncedNorm.apply(*ours, 1e-5, Group(dist.group.WORLD.group_name, 1))
    out.backward(dy)
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    want = torch.nn.functional.batch_norm(exact[0], None, None, exact[1], exact[2], True, 0.1, 1e-5)
    want.backward(dy.double())
    error = ours[0].grad.double() - exact[0].grad
    assert error.square().mean().sqrt() < rms
    assert error.mean((0, 2, 3)).abs().max() < mean
    for got, right in zip(ours[1:], exact[1:], strict=True):
        torch.testing.assert_close(got.grad.double(), right.grad, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(out.double(), want, rtol=0.01, atol=1e-5 if dtype == torch.float32 else 0.05)


def test_a_padded_stem_is_the_stem_and_keeps_its_weights():
    plain, padded = build_model("resnet18", 4, 0).conv1, pad_stem(build_model("resnet18", 4, 0)).conv1
    assert torch.equal(padded.weight, plain.weight) and padded.weight.shape == (64, 3, 7, 7)
    crops = torch.randint(0, 256, (3, 33, 33, 3), dtype=torch.uint8)
    turns = torch.arange(4, dtype=torch.uint8).repeat(3, 1)
    task = [RotationTask((124, 116, 104), (58, 57, 57), torch.float32, crops.device, channels=c) for c in (3, 4)]
    views = [one.views(MicroBatch(crops, torch.zeros(3, dtype=torch.uint8), turns, None, None, 12)) for one in task]
    assert views[1].shape[1] == 4 and views[1].is_contiguous(memory_format=torch.channels_last)
    outs = plain(views[0]), padded(views[1]), padded(views[0])
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=1e-5, atol=1e-5)
    outs[0].square().sum().backward()
    outs[1].square().sum().backward()
    torch.testing.assert_close(padded.weight.grad, plain.weight.grad, rtol=1e-4, atol=1e-2)


def test_the_backbone_is_all_but_the_head():
    model = build_model("resnet18", 4, 0)
    assert set(model.state_dict()) - set(backbone_state(model)) == {"fc.weight", "fc.bias"}
