"""The operations torch sees: Triton on CUDA, plain torch elsewhere; opaque to torch.compile, counted by a roofline."""

from typing import Protocol

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastrot_kernels.operation import operation
from fastrot_kernels.pointwise import reference


class Kernels(Protocol):
    """A module of these functions, each what the operation of its name computes."""

    def forward(self, x: Tensor, weight: Tensor, affine: Tensor | None) -> tuple[Tensor, Tensor]: ...

    def data_gradient(self, dy: Tensor, weight: Tensor, x: Tensor, affine: Tensor) -> tuple[Tensor, Tensor]: ...

    def joined_forward(
        self, x: Tensor, weight: Tensor, affine: Tensor, residual: Tensor, residual_affine: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...

    def joined_gradient(
        self,
        dy: Tensor,
        weight: Tensor,
        xs: list[Tensor],
        affines: list[Tensor],
        mask: Tensor,
        added: Tensor,
        height: int,
        width: int,
        stride: int,
    ) -> tuple[Tensor, Tensor]: ...

    def normed_gradient(
        self, g: Tensor, weight: Tensor, y: Tensor, backward: Tensor, x: Tensor | None, affine: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def weight_gradient(self, dy: Tensor, x: Tensor, affine: Tensor | None) -> Tensor: ...


def kernels_for(x: Tensor) -> Kernels:
    """The module that computes where x lies."""
    if not x.is_cuda:
        return reference
    from fastrot_kernels.pointwise import triton_pointwise

    return triton_pointwise


def affine(moments: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """A norm's constants, float32 [4, C]: mean, 1 / deviation, gamma / deviation, beta; of moments [3, C]."""
    rstd = torch.rsqrt(moments[2] + eps)
    return torch.stack([moments[1], rstd, gamma * rstd, beta])


def backward_affine(sums: Tensor, moments: Tensor, gamma: Tensor, eps: float) -> Tensor:
    """What norm.gradients does, as constants float32 [4, C]: mean, a, b, c; a gradient is a * g + b * (x - mean) + c."""
    along, level = sums / moments[0]
    rstd = torch.rsqrt(moments[2] + eps)
    scale = gamma * rstd
    return torch.stack([moments[1], scale, -scale * along * rstd, -scale * level])


@operation("fastrot::pointwise_forward")
def forward(x: Tensor, weight: Tensor, affine: Tensor | None) -> tuple[Tensor, Tensor]:
    """(y = z @ weight.T [M, N], the moments of y as it is stored, float32 [3, N]).

    z is x, or relu(norm(x)) rounded to x's dtype where affine gives a norm's constants. x [M, K], weight [N, K],
    contiguous, of one dtype: float32, bfloat16 or float16. Sums are float32, products of float32 as torch's
    convolutions take them (torch.backends.cudnn.allow_tf32).
    """
    return kernels_for(x).forward(x, weight, affine)


@forward.register_fake
def _(x: Tensor, weight: Tensor, affine: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(3, weight.shape[0], dtype=torch.float32)


@operation("fastrot::pointwise_data_gradient")
def data_gradient(dy: Tensor, weight: Tensor, x: Tensor, affine: Tensor) -> tuple[Tensor, Tensor]:
    """(g = dy @ weight where relu(norm(x)) is above 0 [M, K], float32 [2, K]: sums of g * xhat and of g).

    The gradient before the ReLU that `forward` took in, of x's dtype, and the sums over its rows that norm.gradients
    asks for: the gradients of gamma and beta. dy [M, N].
    """
    return kernels_for(x).data_gradient(dy, weight, x, affine)


@data_gradient.register_fake
def _(dy: Tensor, weight: Tensor, x: Tensor, affine: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(2, x.shape[1], dtype=torch.float32)


@operation("fastrot::pointwise_joined_forward")
def joined_forward(
    x: Tensor, weight: Tensor, affine: Tensor, residual: Tensor, residual_affine: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(z [M, K], where it is above 0, y = z @ weight.T [M, N], the moments of y [3, N]).

    z is relu(norm(x) + residual) of x's dtype, rounded once; with residual_affine, relu(norm(x) + norm(residual)).
    x, residual [M, K]. Where z is above 0, or not a number, its gradient passes: a bit a value, uint8
    [M, ceil(K / 8)], channel c of a row in bit c % 8 of byte c // 8.
    """
    return kernels_for(x).joined_forward(x, weight, affine, residual, residual_affine)


@joined_forward.register_fake
def _(x: Tensor, weight: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (rows, inputs), outputs = x.shape, len(weight)
    mask = x.new_empty(rows, (inputs + 7) // 8, dtype=torch.uint8)
    return torch.empty_like(x), mask, x.new_empty(rows, outputs), x.new_empty(3, outputs, dtype=torch.float32)


@operation("fastrot::pointwise_joined_gradient")
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
    """(g = dy @ weight + added where the mask is set [M, K], of each norm float32 [2, K]: sums of g * xhat and of g).

    Of `joined_forward`'s z, which a product and a shortcut read: its gradient, rounded once, before the ReLU, and the
    sums that norm.gradients asks for. dy [M, N].

    xs, affines    of the norm that went into z, or of the two.
    added          the shortcut's part [M, K], or of every stride-th row and column of the maps alone.
    height, width  of the maps.
    """
    return kernels_for(dy).joined_gradient(dy, weight, xs, affines, mask, added, height, width, stride)


@joined_gradient.register_fake
def _(_: Tensor, weight: Tensor, xs: list[Tensor], *__: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(xs[0]), weight.new_empty(len(xs), 2, weight.shape[1], dtype=torch.float32)


@operation("fastrot::pointwise_normed_gradient")
def normed_gradient(
    g: Tensor, weight: Tensor, y: Tensor, backward: Tensor, x: Tensor | None, affine: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dy [M, N], and what `data_gradient` gives for it); without x, (dy, dy @ weight, float32 [0, K]).

    dy is the gradient of y, rounded once, by the gradient g after its norm; g, y [M, N]; backward of `backward_affine`.
    """
    return kernels_for(g).normed_gradient(g, weight, y, backward, x, affine)


@normed_gradient.register_fake
def _(
    g: Tensor, weight: Tensor, _y: Tensor, _backward: Tensor, x: Tensor | None, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = weight.shape[1]
    sums = g.new_empty(0 if x is None else 2, inputs, dtype=torch.float32)
    return torch.empty_like(g), g.new_empty(g.shape[0], inputs), sums


@operation("fastrot::pointwise_weight_gradient")
def weight_gradient(dy: Tensor, x: Tensor, affine: Tensor | None) -> Tensor:
    """dy.T @ z, float32 [N, K], z as in `forward`; dy [M, N], x [M, K]. No part of a sum is rounded to 16 bits."""
    return kernels_for(x).weight_gradient(dy, x, affine)


@weight_gradient.register_fake
def _(dy: Tensor, x: Tensor, affine: Tensor | None) -> Tensor:
    return x.new_empty(dy.shape[1], x.shape[1], dtype=torch.float32)


_ROWS_BY_WEIGHT = (
    torch.ops.fastrot.pointwise_forward,
    torch.ops.fastrot.pointwise_joined_forward,
    torch.ops.fastrot.pointwise_data_gradient,
    torch.ops.fastrot.pointwise_joined_gradient,
    torch.ops.fastrot.pointwise_normed_gradient,
)


@register_flop_formula(_ROWS_BY_WEIGHT)
def _product_flops(left: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
    return 2 * left[0] * weight[0] * weight[1]


@register_flop_formula(torch.ops.fastrot.pointwise_weight_gradient)
def _weight_gradient_flops(dy: torch.Size, x: torch.Size, *_: object, **__: object) -> int:
    return 2 * dy[0] * dy[1] * x[1]
