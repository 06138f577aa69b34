"""Batch norm, residual addition and ReLU of a ResNet as one function: fewer passes over the maps, the same numbers."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from fastrot.models.over_ranks import Group, merging, summing
from fastrot_kernels import norm, pool


class _NormAddRelu(torch.autograd.Function):
    """(maps, residual or None) -> (relu(norm(maps) + residual), moments [3, C]).

    Keeps the maps and the moments; the normalised map is computed again in the backward pass, but where a residual
    went into it: there the result is kept, which the next block's convolution keeps in any case.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        relu: bool,
        over_ranks: Group | None,
    ) -> tuple[Tensor, Tensor]:
        rows = rows_of(x)
        [moments] = merging(over_ranks, norm.moments(rows))()
        added = None if residual is None else rows_of(residual)
        out = maps_of(norm.apply(rows, added, moments, weight, bias, eps, relu), x)
        ctx.save_for_backward(x, None if residual is None else out, weight, bias, moments)
        ctx.eps, ctx.relu, ctx.over_ranks = eps, relu, over_ranks
        ctx.mark_non_differentiable(moments)
        ctx.set_materialize_grads(False)  # of the moments there is none: no zeros for them
        return out, moments

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _moments: Tensor) -> tuple[Tensor | None, ...]:
        x, out, weight, bias, moments = ctx.saved_tensors
        dy, rows = rows_of(grad), rows_of(x)
        kept = None if out is None else rows_of(out)
        mine = norm.gradient_sums(dy, rows, kept, moments, weight, bias, ctx.eps, ctx.relu)
        [sums] = summing(ctx.over_ranks, mine)()
        dx, added = norm.gradients(dy, rows, kept, moments, weight, bias, sums, ctx.eps, ctx.relu)
        grad_residual = None if out is None else maps_of(added, x)
        return maps_of(dx, x), grad_residual, mine[0].to(weight.dtype), mine[1].to(bias.dtype), None, None, None


class _NormReluPool(torch.autograd.Function):
    """maps -> (relu(norm(maps)) through a 3x3 max-pool of stride 2, moments [3, C]).

    The normalised map is never in memory. Kept are the maps, and a value a window: where its maximum was, in a byte, and
    what of the maps lay there, over which alone the sums of the backward pass go.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, over_ranks: Group | None
    ) -> tuple[Tensor, Tensor]:
        pixels = x.permute(0, 2, 3, 1).contiguous()
        [moments] = merging(over_ranks, norm.moments(pixels.flatten(0, 2)))()
        y, peaks, winners = pool.forward(pixels, moments, weight, bias, eps)
        ctx.save_for_backward(pixels, peaks, winners, weight, bias, moments)
        ctx.eps, ctx.over_ranks = eps, over_ranks
        ctx.mark_non_differentiable(moments)
        ctx.set_materialize_grads(False)  # of the moments there is none: no zeros for them
        return y.permute(0, 3, 1, 2), moments

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _moments: Tensor) -> tuple[Tensor | None, ...]:
        pixels, peaks, winners, weight, bias, moments = ctx.saved_tensors
        dy, rows = grad.permute(0, 2, 3, 1).contiguous(), peaks.flatten(0, 2)
        mine = norm.gradient_sums(dy.flatten(0, 2), rows, None, moments, weight, bias, ctx.eps, True)
        [sums] = summing(ctx.over_ranks, mine)()
        dx = pool.gradient(dy, winners, pixels, moments, weight, bias, sums, ctx.eps).permute(0, 3, 1, 2)
        return dx, mine[0].to(weight.dtype), mine[1].to(bias.dtype), None, None


def rows_of(maps: Tensor) -> Tensor:
    """[N, C, H, W] as [N*H*W, C]: the same memory where that is channels-last."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1]).contiguous()


def maps_of(rows: Tensor, like: Tensor) -> Tensor:
    """[N*H*W, C] as [N, C, H, W], with the N, H and W of other maps."""
    n, _, height, width = like.shape
    return rows.view(n, height, width, rows.shape[1]).permute(0, 3, 1, 2)


class FusedNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d, with the addition and the ReLU that follow it in the network.

    relu        whether a ReLU follows.
    over_ranks  batch norm over these ranks' views, whose counts may differ; None: over this rank's. The gradients of
    weight and bias are this rank's own, to be summed over the ranks like any other gradient.
    """

    relu: bool
    over_ranks: Group | None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not self.training:
            out = super().forward(x)
            out = out if residual is None else out + residual
            return F.relu(out) if self.relu else out
        parts: tuple[Tensor, Tensor] = _NormAddRelu.apply(  # type: ignore[no-untyped-call]  # torch's apply
            x, residual, self.weight, self.bias, self.eps, self.relu, self.over_ranks
        )
        out, moments = parts
        self.track(moments)
        return out

    def track(self, moments: Tensor) -> None:
        """Count a batch, and move the running statistics towards its moments."""
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        if self.momentum:
            assert self.running_mean is not None and self.running_var is not None
            norm.update_running(self.running_mean, self.running_var, moments, self.momentum)


class _StemNorm2d(FusedNorm2d):
    """The first norm, and the max-pool after its ReLU where that is given: probes read the map between."""

    def forward(self, x: Tensor, residual: Tensor | None = None, maxpool: nn.Module | None = None) -> Tensor:
        if maxpool is None or not self.training:
            out = super().forward(x, residual)
            return out if maxpool is None else maxpool(out)
        parts: tuple[Tensor, Tensor] = _NormReluPool.apply(x, self.weight, self.bias, self.eps, self.over_ranks)  # type: ignore[no-untyped-call]  # torch's apply
        out, moments = parts
        self.track(moments)
        return out


class _FusedStem(ResNet):  # type: ignore[misc]  # torchvision has no types
    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x), maxpool=self.maxpool)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        out: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return out


class _FusedBasicBlock(BasicBlock):  # type: ignore[misc]  # torchvision has no types
    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.bn2(self.conv2(self.bn1(self.conv1(x))), identity)
        return out


class FusedBottleneck(Bottleneck):  # type: ignore[misc]  # torchvision has no types
    """A Bottleneck of FusedNorm2d."""

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.bn3(self.conv3(self.bn2(self.conv2(self.bn1(self.conv1(x))))), identity)
        return out


_BLOCKS = {BasicBlock: _FusedBasicBlock, Bottleneck: FusedBottleneck}


def fuse_norm(module: nn.BatchNorm2d, relu: bool, over_ranks: Group | None) -> None:
    """Make a norm a FusedNorm2d, in place."""
    module.__class__ = FusedNorm2d
    assert isinstance(module, FusedNorm2d)
    module.relu, module.over_ranks = relu, over_ranks


def fuse_norms(model: ResNet, over_ranks: Group | None) -> ResNet:
    """Make every norm of a torchvision ResNet a FusedNorm2d, in place; parameters stay the same objects, names too.

    Where a ResNet's own max-pool follows the stem's, the network calls both as one.
    """
    for name, module in model.named_modules():
        if type(module) is nn.BatchNorm2d:
            fuse_norm(module, "downsample" not in name, over_ranks)
        elif type(module) in _BLOCKS:
            module.__class__ = _BLOCKS[type(module)]
    model.relu = nn.Identity()  # the stem's, which bn1 has done
    if repr(model.maxpool) == repr(nn.MaxPool2d(3, 2, 1)):
        model.bn1.__class__ = _StemNorm2d
        model.__class__ = _with_fused_stem(type(model))  # type: ignore[arg-type]  # mypy: a class may not be hashable
    return model


@cache
def _with_fused_stem(kind: type[ResNet]) -> type[ResNet]:
    return type(kind.__name__, (_FusedStem, kind), {})
