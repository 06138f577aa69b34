"""Cholesky factors of rows short of their margin: preconditioners, exact ones where new and of all such rows."""

import torch
from torch import Tensor

from fastrot.probes.kernel import Gram

# Time in operations of a factor: its blocks gathered, a value; a pair of products, a value of K, each and for each
# problem; a pair of triangular solves, a value. Products of few columns wait for memory and for the calls around
# them, solves for memory. Measured on two threads of a Xeon of 2023, n = 3,400, 10 problems.
_GATHER, _PAIR, _COLUMN, _SOLVES = 250, 24, 5, 38
_BARE = 10  # conjugate gradients without a factor take about so many times √D pairs of products a step
_SOME, _STRONG = 500, 10  # rows of a factor, where √D is not above the other
_FEW = 1000  # rows that are cheap enough to factor all


def _stride(size: Tensor, strength: Tensor) -> Tensor:
    """A factor takes one of so many active rows: some are as good as all where the rounds are few in any case, √D."""
    return torch.where((strength > _STRONG) | (size <= _FEW), 1, (size / _SOME).ceil())


class Factors:
    """For each of P problems on each of G groups of n rows, M = K_BB + 1/D_B of some rows B, factored, or nothing.

    curve  float64 [G, n, P]: D on the rows B, 0 elsewhere; 0 on all where nothing is held.
    """

    def __init__(self, groups: int, rows: int, problems: int, device: torch.device):
        self.curve = torch.zeros(groups, rows, problems, dtype=torch.float64, device=device)
        self._held: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def tired(self, curve: Tensor, wanted: Tensor, columns: Tensor) -> Tensor:
        """Bool [G, P']: would a new factor cost less than the rounds that the Newton step takes without? P' of columns.

        wanted  bool [G, P']: the problems that step at all.

        An old factor, or one of some rows, leaves an eigenvalue other than 1 for each row whose D it does not hold,
        spread over about 1 to D: conjugate gradients take a few rounds for each, or √D. Products are shared: the problem
        of most rounds pays for them, so those are renewed first, as many as make the whole cheapest.
        """
        groups, rows, problems = curve.shape
        held = self.curve[..., columns]
        size, old = ((c > 0).sum(1).double() for c in (curve, held))
        strength = curve.amax(1).sqrt()
        size = size / _stride(size, strength)
        wanted = wanted & (strength > 1)  # below, a few rounds are enough
        few = 1 + torch.minimum(2 * (held != curve).sum(1), strength)
        rounds = torch.where(wanted, torch.where(old > 0, few, _BARE * strength), 0).flatten()
        order = rounds.argsort(descending=True)
        price = torch.where(wanted, size**3 / 3 + _GATHER * size**2, 0).flatten()[order]
        solves = _SOLVES * rounds[order] * old.flatten()[order] ** 2
        products = rounds[order].clamp(min=1) * groups * (_PAIR + _COLUMN * problems) * rows**2
        nothing = torch.zeros_like(price[:1])
        renewed = torch.cat([nothing, price.cumsum(0)])  # the first k of them, for k = 0, 1, ...
        kept = torch.cat([products + solves.flip(0).cumsum(0).flip(0), nothing])
        tired = torch.zeros_like(wanted).flatten()
        tired[order[: int((renewed + kept).argmin())]] = True
        return tired.view_as(wanted) & wanted

    def renew(self, kernel: Gram, dtype: torch.dtype, curve: Tensor, which: Tensor, columns: Tensor) -> None:
        """Factor the rows where D = curve > 0 of the problems which, bool [G, P']; P' of columns."""
        names, strides = columns.tolist(), _stride((curve > 0).sum(1), curve.amax(1).sqrt()).long().tolist()
        for group, at in which.nonzero().tolist():
            column = curve[group, :, at]
            rows = column.nonzero()[:: strides[group][at], 0]
            matrix, ridge = kernel.block(group, rows, dtype), 1 / column[rows]
            matrix.diagonal().add_(ridge)
            factor, failed = torch.linalg.cholesky_ex(matrix)
            if failed:  # not positive definite to float32
                matrix = kernel.block(group, rows, torch.float64)
                matrix.diagonal().add_(ridge)
                factor = torch.linalg.cholesky(matrix)
            self._held[group, names[at]] = rows, factor
            self.curve[group, :, names[at]] = 0
            self.curve[group, rows, names[at]] = column[rows]

    def exact(self, curve: Tensor, columns: Tensor) -> Tensor:
        """Bool [G, P']: whose factors are of all rows where D = curve > 0, and of no others."""
        return (self.curve[..., columns] == curve).all(1)

    def any(self, columns: Tensor) -> bool:
        """Whether any of the problems has one."""
        return bool((self.curve[..., columns] > 0).any())

    def part(self, columns: slice) -> "Factors":
        """Those of neighbouring problems."""
        groups, rows, _ = self.curve.shape
        first, last, _ = columns.indices(self.curve.shape[2])
        out = Factors(groups, rows, last - first, self.curve.device)
        out.curve = self.curve[..., columns].clone()
        out._held = {(g, c - first): held for (g, c), held in self._held.items() if first <= c < last}
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
