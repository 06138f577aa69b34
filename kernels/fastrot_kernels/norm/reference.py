"""The truth: the six operations in plain torch, on any device."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastrot_kernels.norm.interface import Norm


def moments(x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x.float(), 0, correction=0)
    return torch.stack([torch.full_like(mean, len(x)), mean, var])


def merge(parts: Tensor) -> Tensor:
    counts, means, variances = parts.unbind(1)
    total = counts.sum(0)
    share = counts / total
    mean = (share * means).sum(0)
    return torch.stack([total, mean, (share * (variances + (means - mean) ** 2)).sum(0)])


def update_running(running_mean: Tensor, running_var: Tensor, moments: Tensor, momentum: float) -> None:
    count, mean, var = moments
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(var * (count / (count - 1)), momentum)


def apply(x: Tensor, residual: Tensor | None, norm: Norm) -> Tensor:
    z = _normalised(x, norm) * norm.weight + norm.bias
    if residual is not None:
        z += residual.float()
    return (F.relu(z) if norm.relu else z).to(x.dtype)


def gradient_sums(dy: Tensor, x: Tensor, y: Tensor | None, norm: Norm) -> Tensor:
    xhat = _normalised(x, norm)
    g = _through_relu(dy, xhat, y, norm)
    return torch.stack([(g * xhat).sum(0), g.sum(0)])


def gradients(dy: Tensor, x: Tensor, y: Tensor | None, norm: Norm, sums: Tensor) -> tuple[Tensor, Tensor]:
    xhat = _normalised(x, norm)
    g = _through_relu(dy, xhat, y, norm)
    along, level = sums / norm.moments[0]
    dx = (g - level - xhat * along) * (norm.weight * _rstd(norm))
    return dx.to(x.dtype), g.to(x.dtype) if y is not None else x.new_empty(0, x.shape[1])


def _rstd(norm: Norm) -> Tensor:
    return torch.rsqrt(norm.moments[2] + norm.eps)


def _normalised(x: Tensor, norm: Norm) -> Tensor:
    return (x.float() - norm.moments[1]) * _rstd(norm)


def _through_relu(dy: Tensor, xhat: Tensor, y: Tensor | None, norm: Norm) -> Tensor:
    """The gradient before the ReLU, fp32; what came out of it is read where kept and computed again where not."""
    if not norm.relu:
        return dy.float()
    out = xhat * norm.weight + norm.bias if y is None else y
    return torch.where(out <= 0, 0.0, dy.float())
