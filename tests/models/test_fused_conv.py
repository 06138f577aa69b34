"""Bottlenecks with batch norm in their 1x1 convolutions, against torch's own modules."""

import copy

import pytest
import torch
from test_fused_norm import assert_step_as_exact
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from fastrot.models.fused_conv import fuse_convs
from fastrot.models.fused_norm import fuse_norms
from fastrot_kernels import norm, pointwise
from fastrot_kernels.norm import triton_norm
from fastrot_kernels.pointwise import triton_pointwise
from workers.steps import bottlenecks

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Triton 3.6's interpreter cuts bfloat16 off where a GPU rounds it
CASES = [
    *(pytest.param("cpu", dtype, id=f"cpu-{dtype}") for dtype in (None, torch.bfloat16)),
    *(
        pytest.param("cpu", dtype, id=f"cpu-triton-{dtype}")
        for dtype in (None, torch.float16)
        if triton_pointwise.INTERPRETED
    ),
    *(pytest.param("cuda", dtype, marks=pytest.mark.gpu) for dtype in (None, torch.bfloat16)),
]
# channels in, of 64 out; stride; whether the shortcut has a convolution
BLOCKS = {"identity": (64, 1, False), "wider": (32, 1, True), "halved": (32, 2, True)}


@pytest.fixture(autouse=True)
def float32_is_float32(monkeypatch):
    """In convolutions on a GPU, where torch's default is TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def block_of(kind: str) -> Bottleneck:
    torch.manual_seed(0)
    inputs, stride, convolved = BLOCKS[kind]
    shortcut = nn.Sequential(nn.Conv2d(inputs, 64, 1, stride, bias=False), nn.BatchNorm2d(64)) if convolved else None
    block = Bottleneck(inputs, 16, stride, shortcut)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1.0, 1.5)
            nn.init.normal_(module.bias)
    return block


def fused_block(block: Bottleneck, fuse=fuse_convs) -> Bottleneck:
    """A copy, as it would be in a fused network."""
    model = ResNet(BasicBlock, [1, 1, 1, 1])
    model.layer1 = nn.Sequential(copy.deepcopy(block))
    return fuse(model, over_ranks=None).layer1[0]


def step(module, x, dy, dtype=None):
    """Output, every gradient and every running statistic of a training step."""
    leaf = x.clone().requires_grad_()
    with torch.autocast(x.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        out = module(leaf)
    out.backward(dy.to(out.dtype))
    gradients = {f"{name}.grad": p.grad for name, p in module.named_parameters()}
    return {"out": out.detach(), "dx": leaf.grad, **gradients, **dict(module.named_buffers())}


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")  # of the interpreter
@pytest.mark.parametrize("device, dtype", CASES)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_is_no_farther_from_float64_than_torchs_modules(monkeypatch, request, device, kind, dtype, layout):
    if "cpu-triton" in request.node.name:
        monkeypatch.setattr(norm.op, "kernels_for", lambda x: triton_norm)
        monkeypatch.setattr(pointwise.op, "kernels_for", lambda x: triton_pointwise)
    assert_block_as_exact(device, kind, dtype, layout, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_in_tf32_is_near_torchs_modules(monkeypatch, kind):
    """Four times their distance from float64: Triton's products cut float32 off at TF32's bits, cuDNN's may round, and
    what is cut off does not average out."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert_block_as_exact("cuda", kind, None, torch.channels_last, 4)


def assert_block_as_exact(device, kind, dtype, layout, times):
    """Everything of a step at most `times` as far from float64 as torch's modules are."""
    plain = block_of(kind).to(device).to(memory_format=layout)
    ours, exact = fused_block(plain), copy.deepcopy(plain).double()
    x = torch.randn(3, BLOCKS[kind][0], 17, 18, device=device).to(memory_format=layout)
    side = (17, 18) if BLOCKS[kind][1] == 1 else (9, 9)
    dy = torch.randn(3, 64, *side, device=device)
    right, want, got = step(exact, x.double(), dy.double()), step(plain, x, dy, dtype), step(ours, x, dy, dtype)
    assert got["out"].is_contiguous(memory_format=torch.channels_last)
    for name, value in right.items():
        assert (got[name].dtype, got[name].shape) == (want[name].dtype, want[name].shape), name
        far = [(each[name].double() - value.double()).norm() for each in (want, got)]
        assert far[1] <= times * far[0] + 1e-5 * value.double().norm(), name


@pytest.mark.parametrize("device", DEVICES)
def test_weight_gradients_are_not_rounded_to_the_maps_dtype(device):
    """Of the 1x1 convolutions: a sum over all views, added up and kept in float32."""
    block = fused_block(block_of("wider").to(device))
    got = step(block, torch.randn(3, 32, 9, 9, device=device), torch.randn(3, 64, 9, 9, device=device), torch.bfloat16)
    for name in ("conv1", "conv3", "downsample.0"):
        dw = got[f"{name}.weight.grad"]
        assert (dw != dw.bfloat16()).float().mean() > 0.5, name


@pytest.mark.parametrize("fuse", [fuse_norms, fuse_convs])
def test_a_backward_pass_copies_nothing_to_itself_and_fills_no_zeros(fuse):
    """The zeros would be gradients of moments, which have none."""
    block, seen = fused_block(block_of("halved"), fuse), []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.overloadpacket.__name__
            seen.append(f"{name} of itself" if name == "copy_" and args[0].data_ptr() == args[1].data_ptr() else name)
            return function(*args, **(kwargs or {}))

    out = block(torch.randn(3, 32, 8, 8, requires_grad=True))
    with Seen():
        out.backward(torch.ones_like(out))
    assert "convolution_backward" in seen
    assert not {"copy_ of itself", "zeros", "zero_", "new_zeros", "zeros_like"} & set(seen)


@pytest.mark.parametrize("device", DEVICES)
def test_a_network_is_as_exact_as_the_plain_one_and_shares_its_checkpoint(device):
    plain = bottlenecks().to(device)
    fused, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    parameters = dict(fused.named_parameters())
    fuse_convs(fused, over_ranks=None)
    assert all(p is parameters[name] for name, p in fused.named_parameters())
    assert fused.state_dict().keys() == plain.state_dict().keys()
    x, target = torch.randn(8, 3, 48, 48, device=device), torch.arange(8, device=device) % 4
    assert_step_as_exact(exact, plain, fused, x, target)
    plain.load_state_dict(fused.state_dict())
    plain.eval(), fused.eval()
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)


def test_blocks_without_1x1_convolutions_are_those_of_fused_norms():
    ours, theirs = (fuse(ResNet(BasicBlock, [1, 1, 1, 1]), over_ranks=None) for fuse in (fuse_convs, fuse_norms))
    assert [type(module) for module in ours.modules()] == [type(module) for module in theirs.modules()]


def test_a_block_keeps_one_map_less_than_with_fused_norms():
    """bn2's result, which conv3 computes as it reads."""
    block = block_of("identity").to(memory_format=torch.channels_last)
    x = torch.randn(6, 64, 30, 30).to(memory_format=torch.channels_last)
    kept = []
    for fuse in (fuse_norms, fuse_convs):
        held = {}
        pack = lambda t, held=held: (held.setdefault(t.untyped_storage().data_ptr(), t), t)[1]  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = fused_block(block, fuse)(x)
        kept.append(sum(t.untyped_storage().nbytes() for t in held.values()))
        out.sum().backward()
    assert kept[0] - kept[1] == pytest.approx(6 * 16 * 30 * 30 * 4, rel=0.05)


@pytest.mark.slow
def test_a_network_compiles_whole():
    """No break of the graph, under autocast, and through autograd the same gradients."""
    plain = fuse_convs(bottlenecks(), over_ranks=None)
    compiled = copy.deepcopy(plain)
    compiled.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    x = torch.randn(4, 3, 48, 48)
    for model in (plain, compiled):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        out.float().square().sum().backward()
    for (name, ours), want in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        near = {"rtol": 0.02, "atol": 0.02 * want.grad.abs().max().item()}
        torch.testing.assert_close(ours.grad, want.grad, **near, msg=lambda m, n=name: f"{n}: {m}")
    for name, value in plain.named_buffers():
        torch.testing.assert_close(dict(compiled.named_buffers())[name], value)
