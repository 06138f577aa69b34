"""The truth: the six operations in plain torch, on any device."""

import torch
from torch import Tensor
from torch.nn import functional as F


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


def apply(
    x: Tensor, residual: Tensor | None, moments: Tensor, weight: Tensor, bias: Tensor, eps: float, relu: bool
) -> Tensor:
    z = _normalised(x, moments, eps) * weight + bias
    if residual is not None:
        z += residual.float()
    return (F.relu(z) if relu else z).to(x.dtype)


def gradient_sums(
    dy: Tensor, x: Tensor, y: Tensor | None, moments: Tensor, weight: Tensor, bias: Tensor, eps: float, relu: bool
) -> Tensor:
    xhat = _normalised(x, moments, eps)
    g = _through_relu(dy, xhat, y, weight, bias, relu)
    return torch.stack([(g * xhat).sum(0), g.sum(0)])


def gradients(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    moments: Tensor,
    weight: Tensor,
    bias: Tensor,
    sums: Tensor,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    xhat = _normalised(x, moments, eps)
    g = _through_relu(dy, xhat, y, weight, bias, relu)
    along, level = sums / moments[0]
    dx = (g - level - xhat * along) * (weight * torch.rsqrt(moments[2] + eps))
    return dx.to(x.dtype), g.to(x.dtype) if y is not None else x.new_empty(0, x.shape[1])


def _normalised(x: Tensor, moments: Tensor, eps: float) -> Tensor:
    return (x.float() - moments[1]) * torch.rsqrt(moments[2] + eps)


def _through_relu(dy: Tensor, xhat: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    """The gradient before the ReLU, fp32; what came out of it is read where kept and computed again where not."""
    if not relu:
        return dy.float()
    out = xhat * weight + bias if y is None else y
    return torch.where(out <= 0, 0.0, dy.float())
