"""The operations torch sees: Triton on CUDA, plain torch elsewhere; opaque to torch.compile, counted by a roofline."""

from typing import Protocol

import torch
from torch import Tensor

from fastrot_kernels.norm.interface import Norm
from fastrot_kernels.operation import operation
from fastrot_kernels.pool import reference


class Kernels(Protocol):
    """A module of these functions, each what the operation of its name computes."""

    def forward(self, x: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]: ...

    def gradient(self, dy: Tensor, winners: Tensor, x: Tensor, norm: Norm, sums: Tensor) -> Tensor: ...


def kernels_for(x: Tensor) -> Kernels:
    """The module that computes where x lies."""
    if not x.is_cuda:
        return reference
    from fastrot_kernels.pool import triton_pool

    return triton_pool


@operation("fastrot::pool_forward")
def forward(x: Tensor, moments: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, peaks, winners), [N, ceil(H/2), ceil(W/2), C]: the maxima of relu(norm(x)); x there; which of nine, uint8.

    A window's values are compared as y's dtype holds them, which is x's; of equal ones the first wins, row by row, as in
    torch. Where y is 0 any may: its gradient ends at the ReLU. x [N, H, W, C] contiguous, moments float32 [3, C],
    weight, bias [C].
    """
    return kernels_for(x).forward(x, Norm(moments, weight, bias, eps, True))


@forward.register_fake
def _(x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    y = empty_pooled(x)
    return y, torch.empty_like(y), torch.empty_like(y, dtype=torch.uint8)


@operation("fastrot::pool_gradient")
def gradient(
    dy: Tensor,
    winners: Tensor,
    x: Tensor,
    moments: Tensor,
    weight: Tensor,
    bias: Tensor,
    sums: Tensor,
    eps: float,
) -> Tensor:
    """The gradient of x, of its dtype, by that of y.

    sums  of `norm.gradient_sums`, of dy and peaks as rows [M, C], over all that the moments are of: over all ranks where
    those are.
    """
    return kernels_for(x).gradient(dy, winners, x, Norm(moments, weight, bias, eps, True), sums)


@gradient.register_fake
def _(_: Tensor, __: Tensor, x: Tensor, *___: object) -> Tensor:
    return torch.empty_like(x)


def empty_pooled(x: Tensor) -> Tensor:
    """Memory for a value a window."""
    n, height, width, channels = x.shape
    return x.new_empty(n, (height + 1) // 2, (width + 1) // 2, channels)
