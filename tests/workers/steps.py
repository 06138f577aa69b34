"""One rank of the engine tests: trains a tiny network in one mode and writes what came out.

A mode is kind-precision-zero-optimizer, and any of -clip and
micro: two micro-steps a step, on a network without batch norm (which sees a micro-step's views).
fused: batch norm and ReLU as one function.
bottlenecks: another network, whose 1x1 convolutions take in batch norm.
chained: and the backward pass of the norm before them.
compiled: by torch.compile, but for the kernels.
grouped: batch norm over two groups of ranks.
graphed: replayed, with the norms' communication, as from CUDA graphs.
small: gradients averaged in several buckets; whole: in one piece after the backward pass.
"""

import copy
import os
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from fastrot import distributed
from fastrot.data.loader import MicroBatch
from fastrot.data.plan import slice_of
from fastrot.engine import StepSettings, make_engine
from fastrot.engine.graphs import Graphed
from fastrot.engine.optimizers import build_optimizer
from fastrot.models.fused_conv import chain_blocks, fuse_convs
from fastrot.models.fused_norm import fuse_norm
from fastrot.models.over_ranks import neighbours
from fastrot.models.sync_batchnorm import synchronise_batchnorm
from workers.graphs import OnTheHost

IMAGES, STEPS = 7, 4  # uneven over two ranks
SMALL_MB = 400 / 2**20  # less than a filter's bytes, more than a norm's


def network(micro: bool = False) -> nn.Module:
    torch.manual_seed(0)
    if micro:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )


def bottlenecks() -> nn.Module:
    """A small ResNet of three Bottlenecks, with a shortcut of each kind."""
    torch.manual_seed(0)
    model = ResNet(BasicBlock, [1, 1, 1, 1])
    shortcuts = [nn.Sequential(nn.Conv2d(8, 32, 1, stride, bias=False), nn.BatchNorm2d(32)) for stride in (1, 2)]
    model.conv1, model.bn1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
    model.layer1 = nn.Sequential(Bottleneck(8, 8, downsample=shortcuts[0]), Bottleneck(32, 8), nn.Conv2d(32, 8, 1))
    model.layer2, model.fc = Bottleneck(8, 8, 2, shortcuts[1]), nn.Linear(32, 4)
    model.layer3 = model.layer4 = nn.Identity()
    return model


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(IMAGES, 3, 9, 9, generator=generator), torch.randint(4, (IMAGES,), generator=generator)


@contextmanager
def all_reduces(sizes: list[int]):
    """Counts what goes through all_reduce, by torch's function or DeepSpeed's."""

    def counted(tensor, *arguments, **options):
        sizes.append(tensor.numel())
        return reduce(tensor, *arguments, **options)

    reduce = dist.all_reduce
    with mock.patch.object(dist, "all_reduce", counted):
        yield


def train(mode: str, ranks, first: int = 0, state=None):
    kind, precision, zero, optimizer_name, *more = mode.split("-")
    micro_steps = 2 if "micro" in more else 1
    model = bottlenecks() if "bottlenecks" in more else network(micro_steps > 1)
    groups = 2 if "grouped" in more else 1
    over_ranks = neighbours(groups, 60)
    if "fused" in more:
        fuse_norm(model[1], True, over_ranks)
        model[2] = nn.Identity()
        fuse_norm(model[4], False, over_ranks)
    if "bottlenecks" in more:
        (chain_blocks if "chained" in more else fuse_convs)(model, over_ranks)
    if over_ranks:
        synchronise_batchnorm(model, over_ranks)
    fused = optimizer_name == "sgd" and precision != "fp16"
    optimizer = build_optimizer(
        optimizer_name,
        model,
        lr=0.05,
        momentum=0.9,
        nesterov=False,
        weight_decay=1e-3,
        decay_norms=True,
        trust=0.1,
        fused=fused,
    )
    bucket_mb = SMALL_MB if "small" in more else 0.0 if "whole" in more else StepSettings.bucket_mb
    clip, graphed = 0.3 if "clip" in more else None, "graphed" in more
    settings = StepSettings(
        precision, int(zero), clip, 0.9, cuda_graphs=graphed, bucket_mb=bucket_mb, average_statistics=groups > 1
    )
    engine = make_engine(kind, model, optimizer, settings, ranks, {})
    if "compiled" in more:
        model.compile(backend="aot_eager", dynamic=False)
    if state:
        engine.load_state(*state)

    def learn(views, batch):
        loss = nn.functional.cross_entropy(engine.module(views).float(), batch.turns, reduction="sum")
        engine.backward(loss, batch.views_of_step, batch.last)
        return loss.detach()[None]

    if graphed:
        learn = Graphed(learn, ranks.device, OnTheHost(1))
    losses, norms, reduced, middle = [], [], [], None
    for step in range(first, STEPS):
        images, target = batch(step)
        sizes = []
        total = torch.zeros(())
        for micro_step in range(micro_steps):
            first_image, last_image = slice_of(IMAGES, ranks.world, micro_steps, micro_step, ranks.rank)
            mine = slice(first_image, last_image)
            last = micro_step == micro_steps - 1
            with all_reduces(sizes):
                total += learn(images[mine], MicroBatch(None, None, target[mine], None, None, IMAGES, last))[0]
        with all_reduces(sizes):
            engine.step()
        reduced.append(sum(sizes))
        losses.append(engine.reduce(total).item())
        norms.append(float(engine.grad_norm))
        if step == 1:
            middle = copy.deepcopy(engine.state())
    weights, momenta, _ = engine.state()
    flat = torch.cat([value.flatten().double() for value in weights.values()])
    return {
        "alike": torch.equal(engine.reduce(flat.clone(), greatest=True), -engine.reduce(-flat, greatest=True)),
        "losses": losses,
        "norms": norms,
        "reduced": reduced,
        "weights": {k: v.clone() for k, v in weights.items()},
        "momenta": {k: v.clone() for k, v in momenta.items()},
    }, middle


def work(out: Path, modes: list[str]) -> None:
    """Every mode whole, and from the middle; rank 0 writes what came out."""
    ranks = distributed.start()
    os.environ["LOCAL_SIZE"] = os.environ["LOCAL_WORLD_SIZE"]  # as DeepSpeed's launcher says it
    results: dict = {}
    for mode in modes:
        whole, middle = train(mode, ranks)
        resumed, _ = train(mode, ranks, 2, middle)
        results[mode] = {"whole": whole, "resumed": resumed}
    results["left in memory"] = [str(path) for path in Path("/dev/shm").glob(f"*_{os.environ['MASTER_PORT']}_*")]
    if ranks.first:
        torch.save(results, out)
    distributed.end()
