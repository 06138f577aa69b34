"""Maps computed again give the same step: gradients and running statistics, once updated, bit for bit."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from fastrot import distributed
from fastrot.models.fused_conv import fuse_convs
from fastrot.models.fused_norm import fuse_norms
from fastrot.models.over_ranks import Group
from fastrot.models.recompute import recompute_blocks
from fastrot.models.sync_batchnorm import synchronise_batchnorm


def everyone():
    return Group(dist.group.WORLD.group_name, dist.get_world_size())


NORMS = {
    "torch": lambda model: model,
    "synchronised": lambda model: synchronise_batchnorm(model, everyone()),
    "fused": lambda model: fuse_norms(model, everyone()),
    "fused_conv": lambda model: fuse_convs(model, everyone()),
}


@pytest.fixture
def alone():
    """A process group of one, in which norms talk to one another all the same."""
    distributed.start()
    yield
    distributed.end()


def step(model, x):
    """(bytes kept for the backward pass, loss, gradients, buffers)."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.nbytes), t)[1], lambda t: t):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x).float(), torch.arange(len(x)) % 4)
        loss.backward()
    return sum(kept), loss.detach(), {n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("norm", NORMS)
def test_a_step_with_recomputed_blocks_is_the_step(alone, norm, block):
    torch.manual_seed(0)
    plain = NORMS[norm](ResNet(block, [1, 2, 1, 1], num_classes=4)).to(memory_format=torch.channels_last)
    ours = recompute_blocks(copy.deepcopy(plain))
    assert ours.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(6, 3, 48, 48).to(memory_format=torch.channels_last)
    kept, *want = step(plain, x)
    less, *got = step(ours, x)
    assert less < 0.5 * kept
    assert torch.equal(got[0], want[0])
    for values, rights in zip(got[1:], want[1:], strict=True):
        for name, right in rights.items():
            assert torch.equal(values[name], right), name
    assert ours.layer1[0].bn1.num_batches_tracked == 1 and ours.layer1[0].bn1.momentum == 0.1
    plain.eval(), ours.eval()
    with torch.no_grad():
        assert torch.equal(ours(x), plain(x))
