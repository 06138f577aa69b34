"""Bottlenecks that do the last norms, addition and ReLU of the block before them, against torch's own modules."""

import copy
import weakref

import pytest
import torch
import torch.distributed as dist
from test_fused_norm import assert_step_as_exact
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from fastrot import distributed
from fastrot.models.fused_conv import Unjoined, chain_blocks, fuse_convs
from fastrot.models.over_ranks import neighbours
from fastrot.models.recompute import recompute_blocks
from fastrot.profiling.layers import Stopwatch
from fastrot_kernels import norm, pointwise
from fastrot_kernels.norm import triton_norm
from fastrot_kernels.pointwise import triton_pointwise
from workers.ranks import as_ranks

# what Triton's interpreter does with a loop's end
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
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
BLOCKS = 5


@pytest.fixture(autouse=True)
def float32_is_float32(monkeypatch):
    """In convolutions on a GPU, where torch's default is TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def joins(monkeypatch):
    """Of every product that makes a block's result, its rows and norms; of every one that makes its gradient, its rows,
    norms and stride; of every one that goes on through a norm, its rows and channels."""
    done = {"forward": [], "gradient": [], "norm": []}
    forward, gradient, norm_ = pointwise.joined_forward, pointwise.joined_gradient, pointwise.normed_gradient

    def make(x, weight, affine, residual, residual_affine):
        done["forward"].append((len(x), 1 if residual_affine is None else 2))
        return forward(x, weight, affine, residual, residual_affine)

    def go_back(dy, weight, xs, *more):
        done["gradient"].append((len(dy), len(xs), more[-1]))
        return gradient(dy, weight, xs, *more)

    def go_through(g, *more):
        done["norm"].append(tuple(g.shape))
        return norm_(g, *more)

    monkeypatch.setattr(pointwise, "joined_forward", make)
    monkeypatch.setattr(pointwise, "normed_gradient", go_through)
    monkeypatch.setattr(pointwise, "joined_gradient", go_back)
    return done


def stages() -> ResNet:
    """A ResNet of two stages: blocks with and without a shortcut's convolution, first of a stage and last."""
    torch.manual_seed(0)
    model = ResNet(BasicBlock, [1, 1, 1, 1])
    shortcuts = [
        nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        for inputs, outputs, stride in ((6, 20, 1), (20, 36, 2))
    ]
    model.conv1, model.bn1, model.maxpool = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Identity()
    model.layer1 = nn.Sequential(Bottleneck(6, 5, downsample=shortcuts[0]), Bottleneck(20, 5), Bottleneck(20, 5))
    model.layer2, model.fc = nn.Sequential(Bottleneck(20, 9, 2, shortcuts[1]), Bottleneck(36, 9)), nn.Linear(36, 4)
    model.layer3 = model.layer4 = nn.Identity()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1.0, 1.5)
            nn.init.normal_(module.bias)
    return model


def views(n=5, device="cpu"):
    """No side that a stride divides, no tile that is full."""
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, 3, 15, 17, generator=generator).to(device), torch.arange(n, device=device) % 4


def gradients(model, losses):
    """Of all parameters, by the losses' backward passes one after the other."""
    for loss in losses:
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_as_exact(exact, plain, ours):
    """Every gradient at most twice as far from float64 as torch's modules are, or 1e-5 of its norm."""
    for name, right in exact.items():
        far = [(each[name].double() - right).norm() for each in (plain, ours)]
        assert far[1] <= 2 * far[0] + 1e-5 * right.norm(), (name, far, right.norm())


def assert_as_exact_in_all(exact, plain, conv, ours):
    """The whole gradient, as in 16 bits that of a few channels is rounding for the most part: about as near as
    fused_conv's is, and of the kind of torch's."""
    gradients = [torch.cat([p.flatten().double() for p in each.values()]) for each in (exact, plain, conv, ours)]
    far = [(each - gradients[0]).norm() for each in gradients[1:]]
    assert far[2] <= 1.3 * far[1] and far[2] <= 3 * far[0], far


@pytest.mark.parametrize("device, dtype", CASES)
def test_a_chain_is_no_farther_from_float64_than_torchs_modules(monkeypatch, request, joins, device, dtype):
    """Float32 and 16 bits; the chain takes the way that it is for, from the last block to the first."""
    plain = stages().to(device)
    ours, conv, exact = (copy.deepcopy(plain) for _ in range(3))
    chain_blocks(ours, over_ranks=None), fuse_convs(conv, over_ranks=None), exact.double()
    if "cpu-triton" in request.node.name:
        monkeypatch.setattr(norm.op, "kernels_for", lambda x: triton_norm)
        monkeypatch.setattr(pointwise.op, "kernels_for", lambda x: triton_pointwise)
    x, target = views(device=device)
    far = []
    for model in (exact, plain, ours) if dtype is None else (exact, plain, conv, ours):
        with torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None and model is not exact):
            out = model(x.to(model.fc.weight.dtype))
        far.append(gradients(model, [F.cross_entropy(out.to(model.fc.weight.dtype), target)]))
    wide, low = 5 * 13 * 15, 5 * 7 * 8
    assert joins["forward"] == [(wide, 2), (wide, 1), (wide, 1), (low, 2)]
    assert joins["gradient"] == [(low, 2, 1), (wide, 1, 2), (wide, 1, 1), (wide, 2, 1)]
    assert joins["norm"] == [*[(low, 36)] * 2, *[(wide, 20)] * 4]  # a shortcut's norm is one more
    (assert_as_exact if dtype is None else assert_as_exact_in_all)(*far)


def test_a_network_is_as_exact_as_the_plain_one_and_shares_its_checkpoint():
    plain = stages()
    ours, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    chain_blocks(ours, over_ranks=None)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    assert_step_as_exact(exact, plain, ours, *views())
    plain.load_state_dict(ours.state_dict())
    plain.eval(), ours.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(views()[0]), plain(views()[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["one after the other", "all forwards first", "a graph twice"])
def test_micro_steps_add_up(joins, way):
    plain = stages()
    ours, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    chain_blocks(ours, over_ranks=None)
    found = []
    for model in (exact, plain, ours):
        kind = model.fc.weight.dtype
        losses = (F.cross_entropy(model(x.to(kind)), target) for x, target in map(views, (5, 3)))
        if way != "one after the other":
            losses = list(losses)
        if way == "a graph twice":
            losses[0].backward(retain_graph=True)
        found.append(gradients(model, losses))
    assert_as_exact(*found)
    assert len(joins["gradient"]) == (BLOCKS - 1) * (3 if way == "a graph twice" else 2)


def test_a_gradient_that_others_look_at_is_not_written_to():
    """That of an input which is its block's residual too: it comes from the next block, which hooks may watch."""
    plain = stages()
    plain.layer1, plain.layer2 = plain.layer1[1:], nn.Identity()
    ours, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    chain_blocks(ours, over_ranks=None)
    x, seen = torch.linspace(-1, 1, 20 * 35).view(1, 20, 5, 7) ** 3, []
    for model in (exact, plain, ours):
        leaf = x.to(model.fc.weight.dtype).requires_grad_()
        left = model.layer1[0](leaf)
        if model is ours:
            left.residual.register_hook(lambda grad: seen.extend((grad, grad.clone())))
        model.layer1[1](left).sin().sum().backward()
        seen.append(leaf.grad)
    exactly, torchs, watched, then, mine = seen
    assert torch.equal(watched, then)
    assert (mine - exactly).norm() <= 2 * (torchs - exactly).norm() + 1e-5 * exactly.norm()


def test_nothing_is_held_after_the_backward_pass():
    """Of what blocks kept for it, though the graph's nodes live on."""

    class Kept:
        def __init__(self, map_):
            self.map = map_

    model, kept = chain_blocks(stages(), over_ranks=None), []
    pack = lambda map_: (box := Kept(map_), kept.append(weakref.ref(box)))[0]  # noqa: E731
    x, target = views()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.map):
        loss = F.cross_entropy(model(x), target)
    assert len(kept) > 30 * BLOCKS and all(box() is not None for box in kept)
    loss.backward()
    assert loss.grad_fn is not None and not any(box() is not None for box in kept)


def test_blocks_are_joined_where_one_follows_the_other():
    """Not the last, whose result the pool reads; nor one before another kind of layer; nor any that is not trained."""
    model = stages()
    model.layer1.insert(2, nn.Identity())
    chain_blocks(model, over_ranks=None)
    blocks = [module for module in model.modules() if isinstance(module, Bottleneck)]
    assert [block.joined for block in blocks] == [True, False, True, True, False]
    x = torch.randn(2, 6, 5, 5)
    assert isinstance(blocks[0](x), Unjoined) and type(blocks[0].eval()(x)) is torch.Tensor


def test_a_stopwatch_times_joined_stages():
    model = chain_blocks(stages(), over_ranks=None)
    model.layer4 = nn.Identity()  # another than layer3
    watch = Stopwatch(model)
    x, target = views()
    watch.timed(torch.Tensor.backward)(F.cross_entropy(model(x), target))
    assert all(seconds > 0 for seconds in watch.read().values())


def gradients_over_ranks(out):
    """Of uneven ranks: all ranks' gradients, summed, and statistics."""
    ranks = distributed.start()
    model = chain_blocks(stages(), neighbours(1, 60))
    x, target = (each[slice(0, 2) if ranks.first else slice(2, 5)] for each in views())
    F.cross_entropy(model(x), target, reduction="sum").backward()
    for p in model.parameters():
        dist.all_reduce(p.grad)
    torch.save(
        {name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers()), f"{out}{ranks.rank}"
    )
    distributed.end()


@pytest.mark.slow
def test_ranks_are_one_network_on_all_views(tmp_path):
    plain, (x, target) = stages(), views()
    F.cross_entropy(plain(x), target, reduction="sum").backward()
    as_ranks(2, gradients_over_ranks, tmp_path / "rank")
    want = {name: p.grad for name, p in plain.named_parameters()} | dict(plain.named_buffers())
    for rank in range(2):
        got = torch.load(tmp_path / f"rank{rank}")
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_recomputed_or_compiled_it_is_fused_conv(joins, compiled):
    """Recomputed: bit for bit; compiled: without a break of the graph."""
    plain = stages()
    ours = chain_blocks(copy.deepcopy(plain), over_ranks=None)
    fuse_convs(plain, over_ranks=None)
    if compiled:
        ours.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    else:
        recompute_blocks(ours)
    x, target = views()
    want, got = (gradients(model, [F.cross_entropy(model(x), target)]) for model in (plain, ours))
    for name, right in want.items():
        near = {"rtol": 1e-4, "atol": 1e-5} if compiled else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(got[name], right, **near, msg=lambda m, n=name: f"{n}: {m}")
    assert not any(joins.values())
