"""Squared-hinge SVMs by the hundred: Newton steps by conjugate gradients, with Cholesky factors where those pay.

A problem is LIBLINEAR's L2-regularised L2-loss SVM with the intercept b among the weights:
    min  ½‖w‖² + ½b² + Σᵢ Cᵢ max(0, 1 - yᵢ fᵢ)²,    fᵢ = w·xᵢ + b,    Cᵢ = cost · weightᵢ.
Its solution is w = Xᵀβ, b = 1ᵀβ, so f = Kβ with K = X Xᵀ + 1, and problems on the same rows share K.
In β the optimum is the fixed point of β*(f)ᵢ = 2 Cᵢ yᵢ max(0, 1 - yᵢ fᵢ).

A Newton step takes the rows short of their margin as given, A, and solves (I + D K) δ = β* - β, D = 2 C on A and 0
elsewhere, by conjugate gradients. At small costs A is every row and they need a few rounds, each one product shared
by all problems. At large costs they would need dozens, while A shrinks to the support vectors: there each problem
gets a Cholesky factor of K_AA, which is the step's solution, or of some rows of A, which leaves few rounds, as it does in
the next steps, for A and D change little. All this runs in float32: gradient, line search and scores are float64, so a
step's rounding is the next step's residual, as in iterative refinement. The objective falls with every step, whatever the
step's precision.

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
from fastrot.probes.factors import Factors
from fastrot.probes.kernel import Features, Gram

TOLERANCE = 1e-4  # of (w, b), absolute, and relative where they are shorter than 1
_NEWTON_STEPS = 200
_CG_STEPS = 1000
# of the gradient left after a step: the share of active rows that the last step changed, as the next may change as
# many, within these; steps less exact put rows on the wrong side of their margin at high costs
_FORCING = (1e-3, 3e-2)
_SINGLE_STEPS = 8  # Newton steps that may be float32; a problem that needs more gets float64
_DROWNED = 100  # times the gradient: a residual whose gradient float32 products would lose in rounding
_SEARCH_STEPS = 30
_DRAWN = 0.7  # of the way to the longest (w, b) that pays
_ROUNDING = 1e-6  # of ‖β‖; a shorter (w, b) has cancelled out, and nothing can be relative to it
_SPECK = 1e-15  # of the gradient: what float32 would grind to denormal numbers, a hundred times slower
_TINY, _TINY_SINGLE = 1e-300, 1e-30  # keep what is nought from being divided by


@dataclass(frozen=True)
class Solution:
    """P problems on each of G groups of n rows.

    beta, scores  float64 [G, n, P]: w = Xᵀβ, b = 1ᵀβ, and f on every row, those left out too.
    error         float64 [G, P]: the gradient's norm; at most this far from the optimum is (w, b).
    factors       of K, for the next problems.
    """

    beta: Tensor
    scores: Tensor
    error: Tensor
    factors: Factors

    def part(self, columns: slice) -> "Solution":
        """Of neighbouring problems."""
        beta, scores, error = (a[..., columns] for a in (self.beta, self.scores, self.error))
        return Solution(beta, scores, error, self.factors.part(columns))


def beginning(kernel: Gram | Features, beta: Tensor) -> Solution:
    """A guess at some solutions, float64 [G, n, P], for Newton to begin at; its error is not known."""
    unknown = torch.full_like(beta[:, 0], torch.inf)
    return Solution(beta, kernel.product(beta), unknown, _no_factors(beta))


def _no_factors(of: Tensor) -> Factors:
    groups, rows, problems = of.shape
    return Factors(groups, rows, problems, of.device)


def lengthened(start: Solution, labels: Tensor, bounds: Tensor) -> Solution:
    """A solution of lower bounds, drawn out most of the way to where these bounds' objective is least along it.

    A longer (w, b) leaves fewer rows short of their margin, nearer to those of these bounds' own optimum; all the
    way leaves too few.
    """
    beta, scores = start.beta, start.scores
    length = 1 + _DRAWN * _search(labels, bounds, beta, scores, beta, scores, torch.zeros_like(bounds[:, :1]))
    return replace(start, beta=length * beta, scores=length * scores)


def solve(
    kernel: Gram | Features, labels: Tensor, bounds: Tensor, start: Solution | None = None, tolerance: float = TOLERANCE
) -> Solution:
    """The optima of P problems on each of G groups of rows.

    labels     float64 ±1, [G, n, P] or broadcast to it.
    bounds     float64 [G, n, P]: D = 2 · cost · weight of each row in each problem; 0 leaves a row out.
    start      a solution of neighbouring problems, where Newton begins.
    tolerance  of (w, b), times ‖(w, b)‖, or 1e-6 ‖β‖ where that is more, where this is below 1.
    Raises Fault where a problem does not get there.
    """
    labels = labels.expand(bounds.shape)
    if start is None:
        nought = torch.zeros_like(bounds)
        start = Solution(nought, nought, nought[:, 0], _no_factors(bounds))
    beta, scores, factors = start.beta, start.scores, start.factors
    final = Solution(torch.empty_like(bounds), torch.empty_like(bounds), torch.empty_like(bounds[:, 0]), factors)
    before = torch.zeros_like(bounds)  # D of the last step
    columns = torch.arange(bounds.shape[-1], device=bounds.device)
    for newton_step in range(_NEWTON_STEPS):
        residual = bounds * _shortfall(labels, scores) - beta
        pull = kernel.product(residual)
        error = _inner(residual, pull).clamp(min=0).sqrt()
        square = torch.maximum(_inner(beta, scores), _ROUNDING**2 * _inner(beta, beta))  # of ‖(w, b)‖
        target = tolerance * square.clamp(_TINY, 1).sqrt()
        done = error <= target
        final.beta[..., columns], final.scores[..., columns], final.error[:, columns] = beta, scores, error[:, 0]
        alive = ~done.all(0).flatten()
        if not alive.any():
            return final
        if not alive.all():
            columns, labels, bounds, beta, scores, before, residual, pull, error, target, done = (
                a[..., alive]
                for a in (columns, labels, bounds, beta, scores, before, residual, pull, error, target, done)
            )
        curve = torch.where(labels * scores < 1, bounds, 0)
        linear = (curve == bounds).all(1, keepdim=True)  # no row is at its margin: the step may be the last
        changed = (curve != before).sum(1, keepdim=True) / (curve > 0).sum(1, keepdim=True).clamp(min=1)
        forcing = torch.where(linear, 0.5 * tolerance, changed.clamp(*_FORCING))
        goal = torch.where(done, torch.inf, torch.maximum(forcing * error, 0.5 * target))
        drowned = (residual.norm(dim=1, keepdim=True) > _DROWNED * error) & ~done  # K takes nearly all of it to nought
        single = kernel.dense and newton_step < _SINGLE_STEPS and not drowned.any()
        dtype = torch.float32 if single else torch.float64
        if kernel.dense:
            factors.renew(kernel, dtype, curve, factors.tired(curve, ~done[:, 0], columns), columns)
        scale = torch.maximum(error, target)
        if single and (factors.exact(curve, columns) | done[:, 0]).all():
            way = factors.solved(residual / scale, pull / scale, ~done[:, 0], columns)
            way = torch.where(done, 0, scale * way)
        else:
            parts = curve, residual, pull, goal, scale
            way = _conjugate_gradients(kernel, dtype, *parts, factors if factors.any(columns) else None, columns)
            stuck = ~done & (way == 0).all(1, keepdim=True)
            if stuck.any():  # a factor that rounding has spoilt, where K is singular: without it there is a way
                way = torch.where(stuck, _conjugate_gradients(kernel, torch.float64, *parts, None, columns), way)
        before = curve
        moved = kernel.product(way)
        length = _search(labels, bounds, beta, scores, way, moved, torch.ones_like(error))
        beta, scores = beta + length * way, scores + length * moved
    raise Fault(f"SVM: {int((~done).sum())} problems did not converge in {_NEWTON_STEPS} Newton steps")


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Sum over the rows, [G, 1, P]."""
    return (a * b).sum(1, keepdim=True)


def _shortfall(labels: Tensor, scores: Tensor) -> Tensor:
    """y max(0, 1 - y f): how much f lacks of its margin."""
    return labels * (1 - labels * scores).clamp(min=0)


def _conjugate_gradients(
    kernel: Gram | Features,
    dtype: torch.dtype,
    curve: Tensor,
    residual: Tensor,
    pull: Tensor,
    goal: Tensor,
    scale: Tensor,
    factors: Factors | None,
    names: Tensor,
) -> Tensor:
    """δ of (I + D K) δ = residual, D = diag(curve), until the gradient left is below goal.

    pull = K residual; scale is the gradient's size; names are the problems' places in factors.

    I + D K is self-adjoint in the inner product aᵀ K b, which is that of the weights Xᵀa and Xᵀb: these are the
    conjugate gradients of the primal Newton system. Its inverse for the rows of a factor is self-adjoint, too: the
    preconditioner. In float32 they run at twice the rate, and the next Newton step, whose gradient is
    float64, mends what they left.
    """
    solution = torch.zeros_like(residual)
    rest = residual / scale
    rest = torch.where(rest.abs() < _SPECK, 0, rest)
    curve, rest, pull, goal = (a.to(dtype) for a in (curve, rest, pull / scale, (goal / scale) ** 2))
    step, way, moved = torch.zeros_like(rest), torch.zeros_like(rest), torch.zeros_like(rest)
    square = _inner(rest, pull)
    last = torch.full_like(square, torch.inf)  # descent of the round before: the first way is the rest's own
    columns = torch.arange(rest.shape[-1], device=rest.device)
    for _ in range(_CG_STEPS):
        open_ = square > goal
        alive = open_.any(0).flatten()
        if not alive.any():
            break
        if int(alive.sum()) <= 0.8 * len(columns):
            solution[..., columns] = step.double()
            columns = columns[alive]
            step, rest, pull, way, moved, curve, square, goal, open_, last = (
                a[..., alive] for a in (step, rest, pull, way, moved, curve, square, goal, open_, last)
            )
        if factors is None:
            near, near_moved, descent = rest, pull, square
        else:
            near = factors.solved(rest, pull, open_[:, 0], names[columns])
            near_moved, descent = kernel.product(near), _inner(near, pull)
        ratio = descent / last.clamp(min=_TINY_SINGLE)
        way, moved = near + ratio * way, near_moved + ratio * moved
        bent = torch.addcmul(way, curve, moved)
        bend = _inner(bent, moved)
        goal = torch.where((bend > 0) & (descent > 0), goal, torch.inf)  # rounding is all that is left
        length = torch.where(square > goal, descent / bend.clamp(min=_TINY_SINGLE), 0)
        step = torch.addcmul(step, length, way)
        rest = torch.addcmul(rest, length, bent, value=-1)
        pull = kernel.product(rest)
        last, square = descent, _inner(rest, pull).clamp(min=0)
    solution[..., columns] = step.double()
    return solution * scale


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
        length = torch.where(wrong & (bend > 0) & new.isfinite(), new, length)
    return length
