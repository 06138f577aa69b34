"""The truth: the products in plain torch, on any device."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastrot_kernels.norm.reference import moments as moments_of


def forward(x: Tensor, weight: Tensor, affine: Tensor | None) -> tuple[Tensor, Tensor]:
    y = (x if affine is None else _normed(x, affine)) @ weight.t()
    return y, moments_of(y)


def data_gradient(dy: Tensor, weight: Tensor, x: Tensor, affine: Tensor) -> tuple[Tensor, Tensor]:
    g = torch.where(_before_relu(x, affine) <= 0, 0.0, dy @ weight)
    return g, _sums(g, x, affine)


def joined_forward(
    x: Tensor, weight: Tensor, affine: Tensor, residual: Tensor, residual_affine: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    added = residual.float() if residual_affine is None else _before_relu(residual, residual_affine)
    joined = F.relu(_before_relu(x, affine) + added).to(x.dtype)
    through = F.pad(~(joined <= 0), (0, -x.shape[1] % 8)).view(len(x), -1, 8)
    mask = (through << torch.arange(8, device=x.device)).sum(2, dtype=torch.uint8)
    return joined, mask, *forward(joined, weight, None)


def joined_gradient(
    dy: Tensor,
    weight: Tensor,
    xs: list[Tensor],
    affines: list[Tensor],
    mask: Tensor,
    added: Tensor,
    height: int,
    width: int,
    stride: int,
) -> tuple[Tensor, Tensor]:
    everywhere = added
    if stride > 1:
        everywhere = torch.zeros_like(xs[0])
        maps = everywhere.view(-1, height, width, weight.shape[1])[:, ::stride, ::stride]
        maps.copy_(added.view(maps.shape))
    bits = (mask[:, :, None] >> torch.arange(8, device=mask.device)) & 1
    through = bits.flatten(1)[:, : weight.shape[1]] != 0
    g = torch.where(through, torch.addmm(everywhere, dy, weight), 0.0)
    return g, torch.stack([_sums(g, x, affine) for x, affine in zip(xs, affines, strict=True)])


def normed_gradient(
    g: Tensor, weight: Tensor, y: Tensor, backward: Tensor, x: Tensor | None, affine: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    mean, a, b, c = backward
    dy = (a * g.float() + b * (y.float() - mean) + c).to(g.dtype)
    if x is None or affine is None:
        return dy, dy @ weight, backward.new_empty(0, weight.shape[1])
    return dy, *data_gradient(dy, weight, x, affine)


def weight_gradient(dy: Tensor, x: Tensor, affine: Tensor | None) -> Tensor:
    return dy.float().t() @ (x if affine is None else _normed(x, affine)).float()


def _sums(g: Tensor, x: Tensor, affine: Tensor) -> Tensor:
    value, (mean, rstd, *_) = g.float(), affine
    return torch.stack([(value * (x.float() - mean)).sum(0) * rstd, value.sum(0)])


def _before_relu(x: Tensor, affine: Tensor) -> Tensor:
    mean, _, scale, shift = affine.unbind()
    return (x.float() - mean) * scale + shift


def _normed(x: Tensor, affine: Tensor) -> Tensor:
    return F.relu(_before_relu(x, affine)).to(x.dtype)
