"""The operations torch sees: Triton on CUDA, plain torch elsewhere; opaque to torch.compile, counted by a roofline."""

import torch
from torch import Tensor

from fastrot_kernels.norm import reference
from fastrot_kernels.norm.interface import Kernels, Norm
from fastrot_kernels.operation import operation


def kernels_for(x: Tensor) -> Kernels:
    """The module that computes where x lies."""
    if not x.is_cuda:
        return reference
    from fastrot_kernels.norm import triton_norm

    return triton_norm


@operation("fastrot::norm_moments")
def moments(x: Tensor) -> Tensor:
    """Each channel's count, mean and variance, float32 [3, C]; x [M, C] contiguous, float32, bfloat16 or float16."""
    return kernels_for(x).moments(x)


@moments.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(3, x.shape[1], dtype=torch.float32)


@operation("fastrot::norm_merge")
def merge(parts: Tensor) -> Tensor:
    """The moments [3, C] of batches taken together; parts float32 [R, 3, C], one batch's moments each."""
    return kernels_for(parts).merge(parts)


@merge.register_fake
def _(parts: Tensor) -> Tensor:
    return torch.empty_like(parts[0])


@operation("fastrot::norm_update_running", mutates=("running_mean", "running_var"))
def update_running(running_mean: Tensor, running_var: Tensor, moments: Tensor, momentum: float) -> None:
    """Move running statistics [C] a share `momentum` towards these moments; the variance without bias, as torch's."""
    kernels_for(moments).update_running(running_mean, running_var, moments, momentum)


@update_running.register_fake
def _(*_: object) -> None:
    return None


@operation("fastrot::norm_apply")
def apply(
    x: Tensor, residual: Tensor | None, moments: Tensor, weight: Tensor, bias: Tensor, eps: float, relu: bool
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias, plus the residual, through ReLU: one pass, one rounding.

    x, residual [M, C] contiguous, of one dtype, that of the result; weight, bias [C].
    Raises ValueError for a residual without ReLU: its gradient would need no mask, and no network here asks.
    """
    if residual is not None and not relu:
        raise ValueError("a residual is added before a ReLU; relu is False")
    return kernels_for(x).apply(x, residual, Norm(moments, weight, bias, eps, relu))


@apply.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


@operation("fastrot::norm_gradient_sums")
def gradient_sums(
    dy: Tensor, x: Tensor, y: Tensor | None, moments: Tensor, weight: Tensor, bias: Tensor, eps: float, relu: bool
) -> Tensor:
    """Gradients of weight and bias, float32 [2, C]: sums over the rows of g * xhat and of g.

    g is dy where apply's result is above 0 (or everywhere without relu); y is that result where a residual went
    into it, None where it is computed again from x.
    """
    return kernels_for(x).gradient_sums(dy, x, y, Norm(moments, weight, bias, eps, relu))


@gradient_sums.register_fake
def _(_: Tensor, x: Tensor, *__: object) -> Tensor:
    return x.new_empty(2, x.shape[1], dtype=torch.float32)


@operation("fastrot::norm_gradients")
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
    """Gradients of x and of the residual (where y is None: [0, C]), of x's dtype.

    sums  of `gradient_sums`, over all that the moments are of: over all ranks where those are.
    """
    return kernels_for(x).gradients(dy, x, y, Norm(moments, weight, bias, eps, relu), sums)


@gradients.register_fake
def _(_: Tensor, x: Tensor, y: Tensor | None, *__: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x) if y is not None else x.new_empty(0, x.shape[1])
