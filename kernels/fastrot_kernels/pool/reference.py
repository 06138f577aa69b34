"""The truth: both operations in plain torch, on any device."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastrot_kernels.norm import reference
from fastrot_kernels.norm.interface import Norm


def forward(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    normed = reference.apply(x.flatten(0, 2), None, norm).view_as(x)
    y, at = (t.permute(0, 2, 3, 1) for t in F.max_pool2d(normed.permute(0, 3, 1, 2), 3, 2, 1, return_indices=True))
    peaks = x.flatten(1, 2).gather(1, at.flatten(1, 2)).view(at.shape)
    top, left = _corners(at)
    winners = (at // x.shape[2] - top) * 3 + at % x.shape[2] - left
    return y.contiguous(), peaks, winners.to(torch.uint8).contiguous()


def gradient(dy: Tensor, winners: Tensor, x: Tensor, norm: Norm, sums: Tensor) -> Tensor:
    top, left = _corners(dy)
    at = (top + winners // 3) * x.shape[2] + left + winners % 3
    g = torch.zeros_like(x, dtype=torch.float32).flatten(1, 2)
    g.scatter_add_(1, at.flatten(1, 2), dy.float().flatten(1, 2))
    return reference.gradients(g.flatten(0, 1), x.flatten(0, 2), None, norm, sums)[0].view_as(x)


def _corners(pooled: Tensor) -> tuple[Tensor, Tensor]:
    """The row and the column of each window's first value, which may lie one outside."""
    down, right = (2 * torch.arange(size, device=pooled.device) - 1 for size in pooled.shape[1:3])
    return down[:, None, None], right[:, None]
