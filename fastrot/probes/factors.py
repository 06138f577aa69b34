"""Cholesky factors of the rows that were short of their margin: exact when new, preconditioners later on."""

import torch
from torch import Tensor

from fastrot.probes.kernel import Gram

# A round's time in operations of a factor: products of few columns and triangular solves wait for memory.
# Measured on one core of a Xeon of 2023, n = 3,400 and 20 problems; a factor of two either way costs little.
_PRODUCT, _SOLVES = 8, 40


class Factors:
    """For each of P problems on each of G groups of n rows, M = K_BB + 1/D_B of some rows B, factored, or nothing.

    sizes  float64 [G, P]: the rows of B; 0 where nothing is held.
    """

    def __init__(self, groups: int, problems: int, device: torch.device):
        self.sizes = torch.zeros(groups, problems, dtype=torch.float64, device=device)
        self._held: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def tired(self, curve: Tensor, rounds: Tensor, columns: Tensor) -> Tensor:
        """Bool [G, P']: would a new factor cost less than the rounds that the last Newton step took? P' of columns.

        A factor takes |A|³ / 3 operations for the |A| rows of curve > 0.
        """
        a_round = _PRODUCT * curve.shape[1] ** 2 + _SOLVES * self.sizes[:, columns] ** 2
        return (curve > 0).sum(1).double() ** 3 / 3 < rounds * a_round

    def renew(self, kernel: Gram, dtype: torch.dtype, curve: Tensor, which: Tensor, columns: Tensor) -> None:
        """Factor the rows where D = curve > 0 of the problems which, bool [G, P']; P' of columns."""
        names = columns.tolist()
        for group, at in which.nonzero().tolist():
            rows = curve[group, :, at].nonzero()[:, 0]
            matrix, ridge = kernel.block(group, rows, dtype), 1 / curve[group, rows, at]
            matrix.diagonal().add_(ridge)
            factor, failed = torch.linalg.cholesky_ex(matrix)
            if failed:  # not positive definite to float32
                matrix = kernel.block(group, rows, torch.float64)
                matrix.diagonal().add_(ridge)
                factor = torch.linalg.cholesky(matrix)
            self._held[group, names[at]] = rows, factor
            self.sizes[group, names[at]] = len(rows)

    def part(self, columns: slice) -> "Factors":
        """Those of neighbouring problems."""
        out = Factors(*self.sizes[:, columns].shape, self.sizes.device)
        out.sizes, first = self.sizes[:, columns].clone(), columns.start
        out._held = {(g, c - first): held for (g, c), held in self._held.items() if first <= c < columns.stop}
        return out

    def solved(self, rest: Tensor, pull: Tensor, which: Tensor, columns: Tensor) -> Tensor:
        """(I + D K)⁻¹ rest = rest - M⁻¹ (K rest)_B of the problems which, rest itself of the others.

        rest, pull = K rest  [G, n, P']. which  bool [G, P']. columns  int64 [P'].
        """
        out, names = rest.clone(), columns.tolist()
        for group, at in which.nonzero().tolist():
            held = self._held.get((group, names[at]))
            if held:
                rows, factor = held
                half = torch.linalg.solve_triangular(factor, pull[group, rows, at, None].to(factor.dtype), upper=False)
                out[group, rows, at] -= torch.linalg.solve_triangular(factor.mT, half, upper=True)[:, 0].to(out.dtype)
        return out
