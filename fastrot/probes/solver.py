"""Squared-hinge SVMs by the hundred: Newton steps by conjugate gradients, every product shared by all problems.

A problem is LIBLINEAR's L2-regularised L2-loss SVM with the intercept b among the weights:
    min  ½‖w‖² + ½b² + Σᵢ Cᵢ max(0, 1 - yᵢ fᵢ)²,    fᵢ = w·xᵢ + b,    Cᵢ = cost · weightᵢ.
Its solution is w = Xᵀβ, b = 1ᵀβ, so f = Kβ with K = X Xᵀ + 1, and problems on the same rows share K.
In β the optimum is the fixed point of β*(f)ᵢ = 2 Cᵢ yᵢ max(0, 1 - yᵢ fᵢ).

Error: β* is dual feasible, and the duality gap is ½ (β* - β)ᵀ K (β* - β) = ½ ‖gradient‖². The objective
is 1-strongly convex, so (w, b) lies within ‖gradient‖ of the optimum, and the decision value of a row x
within ‖gradient‖ · √(‖x‖² + 1).

Source: Keerthi and DeCoste, "A modified finite Newton method for fast solution of large scale linear
SVMs", JMLR 2005; Chapelle, "Training a support vector machine in the primal", Neural Computation 2007.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastrot.errors import Fault
from fastrot.probes.kernel import Features, Gram

TOLERANCE = 1e-4  # of (w, b), absolute, and relative where they are shorter than 1
_NEWTON_STEPS = 200
_CG_STEPS = 1000
# of the gradient left after a step; steps less exact put rows on the wrong side of their margin at high costs
_FORCING = 1e-3
_SEARCH_STEPS = 30
_TINY = 1e-300  # keeps what is nought from being divided by


@dataclass(frozen=True)
class Solution:
    """P problems on each of G groups of n rows.

    beta, scores  float64 [G, n, P]: w = Xᵀβ, b = 1ᵀβ, and f on every row, those left out too.
    error         float64 [G, P]: the gradient's norm; at most this far from the optimum is (w, b).
    products      how often K was multiplied by a block of vectors.
    """

    beta: Tensor
    scores: Tensor
    error: Tensor
    products: int


def solve(
    kernel: Gram | Features, labels: Tensor, bounds: Tensor, start: Solution | None = None, tolerance: float = TOLERANCE
) -> Solution:
    """The optima of P problems on each of G groups of rows.

    labels     float64 ±1, [G, n, P] or broadcast to it.
    bounds     float64 [G, n, P]: D = 2 · cost · weight of each row in each problem; 0 leaves a row out.
    start      a solution of neighbouring problems; its best multiple is where Newton begins.
    tolerance  of (w, b), times ‖(w, b)‖ where that is below 1.
    Raises Fault where a problem does not get there.
    """
    labels = labels.expand(bounds.shape)
    if start is None:
        beta = scores = torch.zeros_like(bounds)
    else:
        zero = torch.zeros_like(start.error[:, None])
        length = _search(labels, bounds, start.beta, start.scores, start.beta, start.scores, zero)
        beta, scores = start.beta * (1 + length), start.scores * (1 + length)
    final = Solution(torch.empty_like(bounds), torch.empty_like(bounds), torch.empty_like(bounds[:, 0]), 0)
    columns, products = torch.arange(bounds.shape[-1], device=bounds.device), 0
    for _ in range(_NEWTON_STEPS):
        residual = bounds * _shortfall(labels, scores) - beta
        pull = kernel.product(residual)
        error = _inner(residual, pull).clamp(min=_TINY).sqrt()
        target = tolerance * _inner(beta, scores).clamp(_TINY, 1).sqrt()
        done = error <= target
        final.beta[..., columns], final.scores[..., columns], final.error[:, columns] = beta, scores, error[:, 0]
        alive = ~done.all(0).flatten()
        if not alive.any():
            return replace(final, products=products + 1)
        columns, labels, bounds, beta, scores, residual, pull, error, target, done = (
            a[..., alive] for a in (columns, labels, bounds, beta, scores, residual, pull, error, target, done)
        )
        curve = torch.where(labels * scores < 1, bounds, 0)
        goal = torch.where(done, torch.inf, torch.maximum(_FORCING * error, 0.5 * target))
        way, steps = _conjugate_gradients(kernel, curve, residual, pull, goal)
        moved = kernel.product(way)
        length = _search(labels, bounds, beta, scores, way, moved, torch.ones_like(error))
        beta, scores = beta + length * way, scores + length * moved
        products += steps + 2
    raise Fault(f"SVM: {int((~done).sum())} problems did not converge in {_NEWTON_STEPS} Newton steps")


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Sum over the rows, [G, 1, P]."""
    return (a * b).sum(1, keepdim=True)


def _shortfall(labels: Tensor, scores: Tensor) -> Tensor:
    """y max(0, 1 - y f): how much f lacks of its margin."""
    return labels * (1 - labels * scores).clamp(min=0)


def _conjugate_gradients(
    kernel: Gram | Features, curve: Tensor, residual: Tensor, pull: Tensor, goal: Tensor
) -> tuple[Tensor, int]:
    """δ of (I + D K) δ = residual, D = diag(curve), until the gradient left is below goal; and the products taken.

    pull = K residual. I + D K is self-adjoint in the inner product aᵀ K b, which is that of the weights
    Xᵀa and Xᵀb: these are the conjugate gradients of the primal Newton system.
    """
    solution = torch.zeros_like(residual)
    step, rest, way, moved = torch.zeros_like(residual), residual, residual, pull
    square, goal = _inner(rest, pull), goal**2
    columns = torch.arange(residual.shape[-1], device=residual.device)
    steps = 0
    while steps < _CG_STEPS:
        alive = (square > goal).any(0).flatten()
        if not alive.any():
            break
        if int(alive.sum()) <= 0.8 * len(columns):
            solution[..., columns] = step
            columns = columns[alive]
            step, rest, way, moved, curve, square, goal = (
                a[..., alive] for a in (step, rest, way, moved, curve, square, goal)
            )
        bent = curve * moved
        length = square / (_inner(way, moved) + _inner(bent, moved)).clamp(min=_TINY)
        length = torch.where(square > goal, length, 0)
        step = torch.addcmul(step, length, way)
        rest = rest - length * (way + bent)
        pull = kernel.product(rest)
        last, square = square, _inner(rest, pull).clamp(min=0)
        ratio = square / last.clamp(min=_TINY)
        way, moved = torch.addcmul(rest, ratio, way), torch.addcmul(pull, ratio, moved)
        steps += 1
    solution[..., columns] = step
    return solution, steps


def _search(
    labels: Tensor, bounds: Tensor, beta: Tensor, scores: Tensor, way: Tensor, moved: Tensor, length: Tensor
) -> Tensor:
    """t [G, 1, P] where the objective along β + t · way is least: convex, piecewise quadratic.

    moved = K · way; length is the first guess: a guarded Newton iteration, to a tenth of the slope at 0.
    """
    tied, own = _inner(beta, moved), _inner(way, moved)
    low, high = torch.full_like(length, -torch.inf), torch.full_like(length, torch.inf)
    enough = 0.1 * (tied - _inner(bounds * _shortfall(labels, scores), moved)).abs()
    for _ in range(_SEARCH_STEPS):
        there = scores + length * moved
        slope = tied + length * own - _inner(bounds * _shortfall(labels, there), moved)
        wrong = slope.abs() > enough
        if not wrong.any():
            break
        low, high = torch.where(slope < 0, length, low), torch.where(slope > 0, length, high)
        bend = own + _inner(torch.where(labels * there < 1, bounds, 0) * moved, moved)
        new = length - slope / bend.clamp(min=_TINY)
        new = torch.where((new > low) & (new < high), new, (low + high) / 2)
        length = torch.where(wrong, new, length)
    return length
