"""What every implementation of the six operations takes and offers; `op` says what each computes."""

from typing import NamedTuple, Protocol

from torch import Tensor


class Norm(NamedTuple):
    """A norm at work: moments float32 [3, C] of the batch, weight and bias [C], and whether a ReLU follows."""

    moments: Tensor
    weight: Tensor
    bias: Tensor
    eps: float
    relu: bool


class Kernels(Protocol):
    """A module of these functions: maps are contiguous rows [M, C]."""

    def moments(self, x: Tensor) -> Tensor: ...

    def merge(self, parts: Tensor) -> Tensor: ...

    def update_running(self, running_mean: Tensor, running_var: Tensor, moments: Tensor, momentum: float) -> None: ...

    def apply(self, x: Tensor, residual: Tensor | None, norm: Norm) -> Tensor: ...

    def gradient_sums(self, dy: Tensor, x: Tensor, y: Tensor | None, norm: Norm) -> Tensor: ...

    def gradients(self, dy: Tensor, x: Tensor, y: Tensor | None, norm: Norm, sums: Tensor) -> tuple[Tensor, Tensor]: ...
