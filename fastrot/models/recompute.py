"""Residual blocks whose maps are computed again in the backward pass instead of kept: time for memory."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet


class _Recomputed(nn.Module):
    """A block that keeps its input alone, so none that the next block would make of what it leaves."""

    joined = False

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            kept: Tensor = super().forward(x)
            return kept
        out: Tensor = checkpoint(
            super().forward,
            x,
            use_reentrant=False,
            preserve_rng_state=False,  # a block draws nothing
            context_fn=lambda: (nullcontext(), _statistics_stay(self)),
        )
        return out


@contextmanager
def _statistics_stay(block: nn.Module) -> Iterator[None]:
    """The block's norms see a batch for the second time, and leave their running statistics as they are."""
    norms = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches


def recompute_blocks(model: ResNet) -> ResNet:
    """Make every residual block of a ResNet compute its maps again in the backward pass, in place."""
    for module in model.modules():
        if isinstance(module, BasicBlock | Bottleneck):
            module.__class__ = type(type(module).__name__, (_Recomputed, type(module)), {})
    return model
