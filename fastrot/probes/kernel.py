"""The matrix K = X Xᵀ + 1 of a set of rows, as products: held whole, or gone through the features."""

import torch
from torch import Tensor


class Gram:
    """K held whole: for fewer rows than features; n² · 8 bytes a group.

    x  float64 [G, n, D]: G groups of n rows. The added 1 is LIBLINEAR's regularised intercept.
    """

    def __init__(self, x: Tensor):
        self.matrix = _gram(x).add_(1)

    def product(self, v: Tensor) -> Tensor:
        """K v, float64 [G, n, P]."""
        return self.matrix @ v


class Features:
    """K never formed, X (Xᵀ v) + 1 (1ᵀ v): for more rows than features. Used as Gram is."""

    def __init__(self, x: Tensor):
        self._x = x

    def product(self, v: Tensor) -> Tensor:
        return self._x @ (self._x.mT @ v) + v.sum(1, keepdim=True)


def kernel_of(x: Tensor) -> Gram | Features:
    """The one with fewer operations a product; x is float64 [G, n, D]."""
    return Gram(x) if x.shape[1] < 2 * x.shape[2] else Features(x)


def _gram(x: Tensor) -> Tensor:
    if x.device.type == "cpu" and len(x) == 1:  # numpy sees that the product is symmetric: half the work
        rows = x[0].numpy()
        return torch.from_numpy(rows @ rows.T)[None]
    return x @ x.mT
