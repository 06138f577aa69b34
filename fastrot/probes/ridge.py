"""Squared-hinge SVMs whose rows all lack of their margin: ridge regressions, all costs in one Krylov space."""

import torch
from torch import Tensor

from fastrot.probes.kernel import Features, Gram

_ROUNDS = 1000  # what they do not reach is left to Newton steps
_NOUGHT = 1e-100  # a cost's share of the rest, from where its steps add nothing
_TINY = 1e-30


def ridges(kernel: Gram | Features, labels: Tensor, weights: Tensor, costs: Tensor, tolerance: float) -> Tensor:
    """β of (I + D K) β = D y, D = 2 · cost · weight, float64 [costs, G, n, P]; for a Gram to float32's rounding.

    labels     y, float64 ±1, [G, n, P] or broadcast to it.
    weights    float64 [G, n, P]; 0 leaves a row out.
    costs      float64 [costs], above 0.
    tolerance  of the gradient ‖D y - (I + D K) β‖ in K, times what it is at β = 0.

    The systems 1 / (2 · cost) + W K differ by multiples of 1, so their Krylov spaces are one: these are the conjugate
    gradients of the highest cost, in K's inner product, and the others' rests are multiples ζ of its own, each smaller.
    Source: Jegerlehner, "Krylov space solvers for shifted linear systems", hep-lat/9612014.
    """
    dtype = torch.float32 if kernel.dense else torch.float64
    shifts = (0.5 / costs)[:, None, None, None]
    least = shifts.min()
    weights, rest = weights.to(dtype), (weights * labels).to(dtype)
    pull = kernel.product(rest)
    way, moved, ways = rest, pull, rest.expand(len(costs), *rest.shape)
    solutions = torch.zeros_like(ways)
    square = _inner(rest, pull)
    goal = tolerance**2 * square
    share = before = torch.ones_like(square).expand(len(costs), *square.shape)  # ζ of this round and of the last
    ratio, last = torch.zeros_like(square), torch.ones_like(square)
    for _ in range(_ROUNDS):
        open_ = square > goal
        if not open_.any():
            break
        bent = float(least) * way + weights * moved
        length = torch.where(open_, square / _inner(bent, moved).clamp(min=_TINY), 0)
        bottom = length * ratio * (before - share) + before * last * (1 + (shifts - least) * length)
        grown = torch.where(open_ & (share > _NOUGHT), before * last / bottom, 0)  # ζ of the next round to this one's
        solutions = torch.addcmul(solutions, (length * grown).to(dtype), ways)
        rest = torch.addcmul(rest, length.to(dtype), bent, value=-1)
        pull = kernel.product(rest)
        left = _inner(rest, pull).clamp(min=0)
        ratio, last, square = left / square.clamp(min=_TINY), length, left
        before, share = share, share * grown
        ways = share.to(dtype) * rest + (ratio * grown**2).to(dtype) * ways
        way, moved = rest + ratio.to(dtype) * way, pull + ratio.to(dtype) * moved
    return solutions.double()


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Sum over the rows, float64 [G, 1, P]."""
    return (a * b).sum(1, keepdim=True).double()
