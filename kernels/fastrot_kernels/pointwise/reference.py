"""The truth: the three products in plain torch, on any device."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastrot_kernels.norm.reference import moments


def forward(x: Tensor, weight: Tensor, affine: Tensor | None) -> tuple[Tensor, Tensor]:
    y = (x if affine is None else _normed(x, affine)) @ weight.t()
    return y, moments(y)


def data_gradient(dy: Tensor, weight: Tensor, x: Tensor, affine: Tensor) -> tuple[Tensor, Tensor]:
    mean, rstd, *_ = affine
    g = torch.where(_before_relu(x, affine) <= 0, 0.0, dy @ weight)
    value = g.float()
    return g, torch.stack([(value * (x.float() - mean)).sum(0) * rstd, value.sum(0)])


def weight_gradient(dy: Tensor, x: Tensor, affine: Tensor | None) -> Tensor:
    return dy.float().t() @ (x if affine is None else _normed(x, affine)).float()


def _before_relu(x: Tensor, affine: Tensor) -> Tensor:
    mean, _, scale, shift = affine.unbind()
    return (x.float() - mean) * scale + shift


def _normed(x: Tensor, affine: Tensor) -> Tensor:
    return F.relu(_before_relu(x, affine)).to(x.dtype)
