"""The fused norms against torch's own modules: output, gradients, running statistics, checkpoints."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from fastrot.models.fused_norm import FusedNorm2d, fuse_norm, fuse_norms
from fastrot.models.resnet import backbone_state, tap_maps

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def norms(relu: bool):
    """(torch's batch norm, ours) with the same affine values."""
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(16)
    nn.init.uniform_(plain.weight, -1.0, 1.5)
    nn.init.normal_(plain.bias)
    ours = copy.deepcopy(plain)
    fuse_norm(ours, relu, over_ranks=None)
    return plain, ours


def passed(module, x, residual, relu, dy):
    """Outputs and gradients of a module called as torchvision's blocks call theirs."""
    leaves = [t.clone().requires_grad_() for t in (x, residual) if t is not None]
    if isinstance(module, FusedNorm2d):
        out = module(*leaves)
    else:
        out = module(leaves[0])
        out = out if residual is None else out + leaves[1]
        out = F.relu(out) if relu else out
    out.backward(dy)
    gradients = {name: p.grad for name, p in module.named_parameters()}
    return {"out": out.detach(), **dict(zip(("dx", "dresidual"), (t.grad for t in leaves), strict=False)), **gradients}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("relu, added", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_norm_is_no_farther_from_float64_than_torchs_modules(device, dtype, relu, added, layout):
    plain, ours = (module.to(device) for module in norms(relu))
    x = (torch.randn(8, 16, 7, 9) * 2 + 1).to(device, dtype).to(memory_format=layout)
    residual = torch.randn_like(x) if added else None
    dy = torch.randn(8, 16, 7, 9).to(device, dtype)
    exact = passed(
        copy.deepcopy(plain).double(), *(t if t is None else t.double() for t in (x, residual)), relu, dy.double()
    )
    want, got = passed(plain, x, residual, relu, dy), passed(ours, x, residual, relu, dy)
    assert got["out"].is_contiguous(memory_format=torch.channels_last)
    for name, right in exact.items():
        far = {which: (values[name].double() - right).abs().max() for which, values in (("torch", want), ("ours", got))}
        assert got[name].dtype == want[name].dtype
        # torch rounds the norm and the sum apart, and so masks other values of near 0; flips of the mask aside
        assert far["ours"] <= 2 * far["torch"] + 1e-5, name
    for name, value in plain.named_buffers():
        torch.testing.assert_close(dict(ours.named_buffers())[name], value, rtol=1e-4, atol=1e-5)
    plain.eval(), ours.eval()
    again, fused = passed(plain, x, residual, relu, dy)["out"], passed(ours, x, residual, relu, dy)["out"]
    torch.testing.assert_close(fused, again, rtol=1e-5 if dtype == torch.float32 else 0.02, atol=1e-4)


def assert_step_as_exact(exact, plain, fused, x, target):
    """Loss, every gradient and every running statistic of a step, each beside plain torch's in float64."""
    values = []
    for model in (exact, plain, fused):
        loss = F.cross_entropy(model(x.to(model.fc.weight.dtype)), target)
        loss.backward()
        gradients = {f"{name}.grad": p.grad for name, p in model.named_parameters()}
        values.append({"loss": loss.detach(), **gradients, **dict(model.named_buffers())})
    for name, right in values[0].items():
        far = [(value[name].double() - right).norm() for value in values[1:]]
        assert far[1] <= 4 * far[0] + 1e-6 * right.double().norm(), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_a_fused_network_is_as_exact_as_the_plain_one_and_shares_its_checkpoint(device, block):
    torch.manual_seed(0)
    plain = ResNet(block, [1, 1, 1, 1], num_classes=4).to(device)
    fused, exact = fuse_norms(copy.deepcopy(plain), over_ranks=None), copy.deepcopy(plain).double()
    assert fused.state_dict().keys() == plain.state_dict().keys()
    assert nn.BatchNorm2d not in {type(module) for module in fused.modules()}
    x, target = torch.randn(8, 3, 48, 48, device=device), torch.arange(8, device=device) % 4
    assert_step_as_exact(exact, plain, fused, x, target)

    fused.load_state_dict(plain.state_dict())
    plain.load_state_dict(fused.state_dict())
    assert backbone_state(fused).keys() == backbone_state(plain).keys()
    plain.eval(), fused.eval()
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)
        for ours, want in zip(tap_maps(fused, x), tap_maps(plain, x), strict=True):
            torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-4)


@pytest.mark.slow  # fused_conv, which holds such norms, is compiled by default
def test_a_fused_network_compiles_whole():
    """No break of the graph, and through autograd the same gradients."""
    torch.manual_seed(0)
    plain = fuse_norms(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4), over_ranks=None)
    compiled = copy.deepcopy(plain)
    compiled.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    x = torch.randn(4, 3, 48, 48)
    for model in (plain, compiled):
        model(x).square().sum().backward()
    for (name, ours), want in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, want.grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    for name, value in plain.named_buffers():
        torch.testing.assert_close(dict(compiled.named_buffers())[name], value)
