"""A network that synchronises its norms over ranks is one graph to a compiler, and computes what it did."""

import copy
import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.resnet import Bottleneck, ResNet

from fastrot import distributed
from fastrot.models.fused_conv import chain_blocks, fuse_convs
from fastrot.models.fused_norm import fuse_norms
from fastrot.models.over_ranks import neighbours
from fastrot.models.resnet import build_model
from fastrot.models.sync_batchnorm import synchronise_batchnorm
from fastrot.profiling.roofline import norm_messages, step_rows
from workers.ranks import as_ranks
from workers.steps import bottlenecks

KINDS = {
    "torch": lambda model: synchronise_batchnorm(model, neighbours(1, 60)),
    "fused": lambda model: fuse_norms(model, neighbours(1, 60)),
    "fused_conv": lambda model: fuse_convs(model, neighbours(1, 60)),
}
# compiled, it is fused_conv
CHAINED = {"fused_chain": lambda model: chain_blocks(model, neighbours(1, 60))}


@pytest.fixture
def two_ranks():
    """This one, and one that is not there."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["torch", pytest.param("fused", marks=pytest.mark.slow), "fused_conv"])
def test_a_network_that_synchronises_its_norms_is_one_graph(two_ranks, kind):
    model, graphs = ResNet(Bottleneck, [1, 1, 1, 1], width_per_group=8), []
    model.layer2 = model.layer3 = model.layer4 = nn.Identity()
    model.fc = nn.Linear(256, 4)
    KINDS[kind](model)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model.compile(backend=backend, fullgraph=True, dynamic=False)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.randn(2, 3, 8, 8))
    out.float().sum().backward()
    assert len(graphs) == 1 and model.conv1.weight.grad is not None
    parts = [part for part in graphs[0].modules() if isinstance(part, torch.fx.GraphModule)]
    calls = [str(node.target) for part in parts for node in part.graph.nodes]
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == 5
    messages = 4 if kind == "fused_conv" else 5  # the shortcut's norm shares another's
    assert sum("all_gather" in call for call in calls) == sum("all_reduce" in call for call in calls) == messages


class Said(TorchDispatchMode):
    """What runs, in order, by the names of torch's operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.append(function.name())
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize(
    "kind, messages, waited_for",
    [
        ("torch", 106, 106),
        pytest.param("fused", 106, 106, marks=pytest.mark.slow),
        ("fused_conv", 98, 62),
        ("fused_chain", 98, 47),
    ],
)
def test_a_step_waits_at_once_for_so_many_messages_of_norms(two_ranks, kind, messages, waited_for):
    """Of ResNet-50's 53 norms, forward and backward. The other messages are on their way during a product."""
    model = (KINDS | CHAINED)[kind](build_model("resnet50", 4, 0))
    with Said() as said:
        model(torch.randn(2, 3, 32, 32)).sum().backward()
    products = ("aten::convolution", "fastrot::pointwise_forward", "fastrot::pointwise_weight_gradient")
    sent = exposed = 0
    for name in said.names:
        if name in ("_c10d_functional::all_reduce", "_c10d_functional::all_gather_into_tensor"):
            sent, idle = sent + 1, True
        elif name.startswith(products):
            idle = False
        elif name == "_c10d_functional::wait_tensor":
            exposed += idle
    assert (sent, exposed) == (messages, waited_for)
    # as `fastrot estimate` counts them, without a step
    each_way, waits = norm_messages(
        step_rows(lambda: (KINDS | CHAINED)[kind](build_model("resnet50", 4, 0)), 2, 1, 32, torch.float32)
    )
    assert (2 * each_way, sum(waits)) == (messages, waited_for)


def compiled_beside_plain(out):
    """Of two uneven ranks: everything of a step, by kind and precision, as this rank has it."""
    ranks, steps = distributed.start(), {}
    for (kind, synchronise), bf16 in itertools.product(KINDS.items(), (False, True)):
        plain = synchronise(bottlenecks())
        compiled = copy.deepcopy(plain)
        compiled.compile(backend="aot_eager", fullgraph=True, dynamic=False)
        x = torch.randn(3 + ranks.rank, 3, 9, 9, generator=torch.Generator().manual_seed(ranks.rank))
        steps[kind, bf16] = []
        for model in (plain, compiled):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                y = model(x).float()
            y.square().sum().backward()
            gradients = {f"{name}.grad": p.grad for name, p in model.named_parameters()}
            steps[kind, bf16].append({"y": y.detach()} | gradients | dict(model.named_buffers()))
    torch.save(steps, out.with_suffix(f".{ranks.rank}"))
    distributed.end()


@pytest.mark.slow
def test_a_compiled_network_over_ranks_computes_what_it_did(tmp_path):
    as_ranks(2, compiled_beside_plain, tmp_path / "steps")
    for rank in range(2):
        for (_, bf16), (want, got) in torch.load(tmp_path / f"steps.{rank}").items():
            for name, value in want.items():
                near = {"rtol": 0.02, "atol": 0.02 * value.abs().max().item()} if bf16 else {"rtol": 1e-5, "atol": 1e-5}
                torch.testing.assert_close(got[name], value, **near, msg=lambda m, n=name: f"{n}: {m}")
