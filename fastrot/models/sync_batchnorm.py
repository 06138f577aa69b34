"""Batch norm over the views of several ranks: equal to one big batch, NCCL or gloo."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastrot.models.over_ranks import Group


class _SyncedNorm(torch.autograd.Function):
    """Batch norm over the batches of a group of ranks: one gather forward, one all-reduce backward.

    CUDA's own kernels are called where nothing is compiled: a compiler fuses what it sees, and those it cannot see into.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, over_ranks: Group
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, var = _local_statistics(x, weight, bias, eps)
        # one rank's (count, mean, variance) a row
        count = torch.full_like(mean[:1], x.numel() // x.shape[1])
        rows = over_ranks.gathering(torch.cat([count, mean, var]))()
        counts, means, variances = rows.split([1, len(mean), len(var)], dim=1)
        total = counts.sum()
        share = counts / total
        mean = (share * means).sum(0)
        var = (share * (variances + (means - mean) ** 2)).sum(0)
        out = F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, var, total)
        ctx.eps, ctx.over_ranks = eps, over_ranks
        ctx.mark_non_differentiable(mean, var, total)
        ctx.set_materialize_grads(False)  # of the statistics there is none: no zeros for them
        return out, mean, var, total

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, total = ctx.saved_tensors
        invstd = torch.rsqrt(var + ctx.eps)
        if x.is_cuda and not torch.compiler.is_compiling():
            if not grad.is_contiguous(memory_format=torch.channels_last):
                grad = grad.contiguous()
            db, dxmu, grad_weight, grad_bias = torch.batch_norm_backward_reduce(
                grad, x, mean, invstd, weight, True, True, True
            )
            db, dxmu = ctx.over_ranks.summing(torch.cat([db, dxmu]))().chunk(2)
            grad_x = torch.batch_norm_backward_elemt(
                grad, x, mean, invstd, weight, db, dxmu, total.to(torch.int32)[None]
            )
            return grad_x, grad_weight, grad_bias, None, None
        # as if mean and variance were constants: dy * w * invstd, and this rank's dw, db
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, var, mean, invstd, False, ctx.eps, [True, True, True]
        )
        dw, db = ctx.over_ranks.summing(torch.cat([grad_weight, grad_bias]))().chunk(2)
        # what flows through the statistics: -(w * invstd / n) * (db + xhat * dw), rounded once
        slope = (weight * invstd / total * dw * invstd)[:, None, None]
        level = (weight * invstd / total * (db - mean * invstd * dw))[:, None, None]
        if grad_x.dtype != torch.float32:
            grad_x = grad.float() * (weight * invstd)[:, None, None]
        grad_x.addcmul_(x.float(), slope, value=-1).sub_(level)
        return grad_x.to(x.dtype), grad_weight, grad_bias, None, None


def _local_statistics(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and variance [C] of this rank's maps, fp32, by torch's own batch-norm kernels: on
    channels-last maps they are many times faster than torch.var_mean, which a compiler makes one pass of."""
    if torch.compiler.is_compiling():
        var, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
        return mean, var
    if x.is_cuda:
        mean, invstd = torch.batch_norm_stats(x, eps)
    else:
        _, mean, invstd = torch.ops.aten.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
    return mean, (invstd**-2 - eps).clamp_(min=0)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the views of some ranks: equal to one big batch within float error, NCCL or gloo.

    Counts may differ between ranks. The gradients of weight and bias are this rank's own, to be
    summed over the ranks like any other gradient.
    """

    over_ranks: Group

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        parts: tuple[Tensor, ...] = _SyncedNorm.apply(x, self.weight, self.bias, self.eps, self.over_ranks)  # type: ignore[no-untyped-call]  # torch's apply
        out, mean, var, total = parts
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        with torch.no_grad():
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (total / (total - 1)), self.momentum)
        return out


def synchronise_batchnorm(model: nn.Module, over_ranks: Group) -> nn.Module:
    """Make every BatchNorm2d of `model` a SyncBatchNorm2d, in place; parameters stay the same objects."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d
            assert isinstance(module, SyncBatchNorm2d)
            module.over_ranks = over_ranks
    return model
