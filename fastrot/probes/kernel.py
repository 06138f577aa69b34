"""The matrix K = X Xᵀ + 1 of a set of rows, as products: held whole, or gone through the features."""

from typing import Literal

import torch
from torch import Tensor

_GATHERED = 512  # columns, from which on torch's gather outruns its index_select on a CPU


class Gram:
    """K held whole, float64 [G, n, n] for G groups of n rows: for fewer rows than features."""

    dense: Literal[True] = True  # has blocks, and products in float32

    def __init__(self, matrix: Tensor):
        self.matrix, self._single = matrix, matrix.float()

    def product(self, v: Tensor) -> Tensor:
        """K v, [G, n, P], in the precision of v: float64 or float32."""
        return (self.matrix if v.dtype == torch.float64 else self._single) @ v

    def among(self, rows: Tensor) -> "Gram":
        """K of some rows of every group; rows int64 [m]."""
        return Gram(self.matrix[:, rows[:, None], rows])

    def block(self, group: int, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """K of some rows of a group with themselves, [m, m] of dtype; rows int64 [m]."""
        whole = (self.matrix if dtype == torch.float64 else self._single)[group]
        picked = whole.index_select(0, rows)  # whole rows first: twice as fast as both at once
        if len(rows) < _GATHERED:
            return picked.index_select(1, rows)
        return picked.gather(1, rows.expand(len(rows), -1))


class Features:
    """K never formed, X (Xᵀ v) + 1 (1ᵀ v), x float64 [G, n, D]: for more rows than features. Used as Gram is."""

    dense: Literal[False] = False  # float32 would drown the gradient in the part of v that K takes to nought

    def __init__(self, x: Tensor):
        self._x = x

    def among(self, rows: Tensor) -> "Features":
        return Features(self._x[:, rows])

    def product(self, v: Tensor) -> Tensor:
        return self._x @ (self._x.mT @ v) + v.sum(1, keepdim=True)


def kernel_of(x: Tensor) -> Gram | Features:
    """The one with fewer operations a product; x is float64 [G, n, D]."""
    return Gram(gram(x)) if x.shape[1] < 2 * x.shape[2] else Features(x)


def gram(x: Tensor) -> Tensor:
    """X Xᵀ + 1, float64 [G, n, n], of x [G, n, D]; the 1 is LIBLINEAR's regularised intercept."""
    if x.device.type == "cpu" and len(x) == 1:  # numpy sees that the product is symmetric: half the work
        rows = x[0].numpy()
        return torch.from_numpy(rows @ rows.T)[None].add_(1)
    return (x @ x.mT).add_(1)
