"""Batch norm, residual addition and ReLU of a ResNet as one function: fewer passes over the maps, the same numbers."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from fastrot_kernels import norm


class _NormAddRelu(torch.autograd.Function):
    """(maps, residual or None) -> (relu(norm(maps) + residual), moments [3, C]).

    Keeps the maps and the moments; the normalised map is computed again in the backward pass, but where a residual
    went into it: there the result is kept, which the next block's convolution keeps in any case.
    """

    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, relu, over_ranks):
        rows = _rows(x)
        moments = norm.moments(rows)
        if over_ranks:
            gathered = moments.new_empty(dist.get_world_size() * moments.numel())
            dist.all_gather_into_tensor(gathered, moments.flatten())
            moments = norm.merge(gathered.view(-1, *moments.shape))
        added = None if residual is None else _rows(residual)
        out = _maps(norm.apply(rows, added, moments, weight, bias, eps, relu), x)
        ctx.save_for_backward(x, None if residual is None else out, weight, bias, moments)
        ctx.eps, ctx.relu, ctx.over_ranks = eps, relu, over_ranks
        ctx.mark_non_differentiable(moments)
        return out, moments

    @staticmethod
    def backward(ctx, grad, _moments):
        x, out, weight, bias, moments = ctx.saved_tensors
        dy, rows = _rows(grad), _rows(x)
        kept = None if out is None else _rows(out)
        mine = norm.gradient_sums(dy, rows, kept, moments, weight, bias, ctx.eps, ctx.relu)
        sums = mine
        if ctx.over_ranks:
            sums = mine.clone()
            dist.all_reduce(sums)
        dx, added = norm.gradients(dy, rows, kept, moments, weight, bias, sums, ctx.eps, ctx.relu)
        grad_residual = None if out is None else _maps(added, x)
        return _maps(dx, x), grad_residual, mine[0].to(weight.dtype), mine[1].to(bias.dtype), None, None, None


def _rows(maps: Tensor) -> Tensor:
    """[N, C, H, W] as [N*H*W, C]: the same memory where that is channels-last."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1]).contiguous()


def _maps(rows: Tensor, like: Tensor) -> Tensor:
    n, channels, height, width = like.shape
    return rows.view(n, height, width, channels).permute(0, 3, 1, 2)


class FusedNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d, with the addition and the ReLU that follow it in the network.

    relu        whether a ReLU follows.
    over_ranks  batch norm over all ranks' views, whose counts may differ. The gradients of weight and bias are this
    rank's own, to be summed over the ranks like any other gradient.
    """

    relu: bool
    over_ranks: bool

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not self.training:
            out = super().forward(x)
            out = out if residual is None else out + residual
            return F.relu(out) if self.relu else out
        if self.over_ranks and dist.get_world_size() > 1:
            return self._synced(x, residual)
        return self._train(x, residual, False)

    @torch.compiler.disable  # a compiled network breaks its graph at each norm that talks to other ranks
    def _synced(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return self._train(x, residual, True)

    def _train(self, x: Tensor, residual: Tensor | None, over_ranks: bool) -> Tensor:
        out, moments = _NormAddRelu.apply(x, residual, self.weight, self.bias, self.eps, self.relu, over_ranks)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        if self.momentum:
            norm.update_running(self.running_mean, self.running_var, moments, self.momentum)
        return out


class _FusedBasicBlock(BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        return self.bn2(self.conv2(self.bn1(self.conv1(x))), identity)


class _FusedBottleneck(Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        return self.bn3(self.conv3(out), identity)


_BLOCKS = {BasicBlock: _FusedBasicBlock, Bottleneck: _FusedBottleneck}


def fuse_norm(module: nn.BatchNorm2d, relu: bool, over_ranks: bool) -> None:
    """Make a norm a FusedNorm2d, in place."""
    module.__class__ = FusedNorm2d
    module.relu, module.over_ranks = relu, over_ranks


def fuse_norms(model: ResNet, over_ranks: bool) -> ResNet:
    """Make every norm of a torchvision ResNet a FusedNorm2d, in place; parameters stay the same objects, names too."""
    for name, module in model.named_modules():
        if type(module) is nn.BatchNorm2d:
            fuse_norm(module, "downsample" not in name, over_ranks)
        elif type(module) in _BLOCKS:
            module.__class__ = _BLOCKS[type(module)]
    model.relu = nn.Identity()  # the stem's, which bn1 has done
    return model
