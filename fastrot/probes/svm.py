"""The linear SVMs of VOC07: all classes, costs and folds at once, and the protocol's table."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fastrot.errors import UserError
from fastrot.probes.kernel import Features, Gram, kernel_of
from fastrot.probes.precision import area_ap, eleven_point_ap, step_ap
from fastrot.probes.progress import Track, silent
from fastrot.probes.ridge import ridges
from fastrot.probes.solver import TOLERANCE, Solution, beginning, lengthened, solve

# MMSelfSup 0.11, svm_voc07/tools/svm_helper.py; the first of equals is taken, so the order matters
COSTS = (1.0, 10.0, 100.0, *(0.5**n for n in range(4, 20)))
FOLDS = 3
POSITIVE_WEIGHT = 2.0  # class_weight {1: 2, -1: 1}
_LOW_COST = 0.1  # up to which nearly all rows lack of their margin, as `ridges` takes them
_BLOCK_ROWS = 512  # test rows held in float64
_BLOCK_COLUMNS = 32  # classes solved together; their float64 arrays of rows and low costs stay small beside K


@dataclass(frozen=True)
class SvmResult:
    """The table of one layer.

    average_precision  percent, mean of per_class (the protocol's figure) over the classes that are not nan.
    eleven_point       percent, the same under VOC 2007's 11-point rule.
    per_class, eleven_point_per_class  float64 [classes], 0..1; nan where train or test has no positive row.
    costs  float64 [classes], chosen by cross-validation.
    cross_validation   float64 [classes, costs]: mean step AP of the held-out folds, in the given order of costs.
    error              the largest distance of any solution from its optimum that the gradient allows.
    fits               problems solved.
    """

    average_precision: float
    eleven_point: float
    per_class: NDArray[np.float64]
    eleven_point_per_class: NDArray[np.float64]
    costs: NDArray[np.float64]
    cross_validation: NDArray[np.float64]
    error: float
    fits: int


def normalised(x: ArrayLike, device: torch.device | str = "cpu") -> Tensor:
    """Rows x / (‖x‖₂ + 1e-5), float64 [n, D]."""
    x = torch.from_numpy(np.array(x, np.float64)).to(device)
    return x.div_(x.norm(dim=1, keepdim=True) + 1e-5)


def stratified_folds(positive: NDArray[np.bool_], folds: int) -> NDArray[np.int64]:
    """The fold that holds each row out, int64 [n]: scikit-learn's StratifiedKFold(folds), unshuffled.

    The class of row 0 is dealt first; each class's rows go to the folds in their order.
    """
    first = positive == positive[0]
    dealt = np.sort(~first)  # the rows of the first class, then the others
    shares = [np.bincount(dealt[fold::folds], minlength=2) for fold in range(folds)]
    held_out = np.empty(len(positive), np.int64)
    for kind, rows in enumerate((first, ~first)):
        held_out[rows] = np.repeat(np.arange(folds), [share[kind] for share in shares])
    return held_out


def path(
    kernel: Gram | Features, labels: Tensor, weights: Tensor, costs: ArrayLike, tolerance: float = TOLERANCE
) -> Iterator[tuple[int, Solution]]:
    """Solve for each cost, least first: (index in costs, solution). The low ones are solved at once, as so many
    problems more in each product with K; each of the others starts from the last.

    labels, weights  float64 [G, n, P], as solver.solve takes them.
    """
    costs, problems = np.asarray(costs, np.float64), weights.shape[2]
    order = np.argsort(costs, kind="stable")
    low, high = order[costs[order] <= _LOW_COST], order[costs[order] > _LOW_COST]
    solution = None
    if len(low):
        bounds = torch.cat([2 * float(costs[index]) * weights for index in low], 2)
        guesses = ridges(kernel, labels, weights, torch.from_numpy(costs[low]).to(weights.device), tolerance)
        start = beginning(kernel, torch.cat([*guesses], 2))
        together = solve(kernel, labels.expand(weights.shape).repeat(1, 1, len(low)), bounds, start, tolerance)
        for at, index in enumerate(low.tolist()):
            solution = together.part(slice(at * problems, (at + 1) * problems))
            yield index, solution
    for at, index in enumerate(high.tolist()):
        bounds = 2 * float(costs[index]) * weights
        if solution and at:  # at the low costs nearly all rows are short of their margin, at any length
            solution = lengthened(solution, labels, bounds)
        solution = solve(kernel, labels, bounds, solution, tolerance)
        yield index, solution


def voc_svm(
    train_x: ArrayLike,
    train_y: ArrayLike,
    test_x: NDArray[np.generic],
    test_y: ArrayLike,
    costs: ArrayLike = COSTS,
    device: torch.device | str = "cpu",
    track: Track = silent,
) -> SvmResult:
    """The VOC07 protocol: a cost a class by 3-fold cross-validation, refit on all rows, AP on the test rows.

    train_x, test_x  [n, D] of any real dtype; rows are normalised here.
    train_y, test_y  int [n, classes]: 1 present, 0 absent, -1 difficult. Difficult rows are negatives in
                     training and cross-validation, and are dropped from a class's test.
    track            shows progress over an iterable: (items, total, title) -> items.
    Source           MMSelfSup 0.11, tools/benchmarks/classification/svm_voc07.
    """
    costs, positive, test_y = np.asarray(costs, np.float64), np.asarray(train_y) == 1, np.asarray(test_y)
    judged = positive.any(0) & (test_y == 1).any(0)
    if not judged.any():
        raise UserError("SVM: no class has a positive row both in the training and in the test set")
    x = normalised(train_x, device)
    problems = _Problems(kernel_of(x[None]), positive, costs, x.device)
    betas, cross_error = problems.cross_validated(track)
    validation = problems.precisions(betas)
    best = validation.argmax(1)
    beta, final_error = problems.refitted(betas, best)
    parts = (normalised(test_x[at : at + _BLOCK_ROWS], device) for at in range(0, len(test_x), _BLOCK_ROWS))
    scores = torch.cat(list(decide(x, beta[0], parts))).cpu().numpy()
    kept = [column != -1 for column in test_y.T]
    area, eleven = (
        np.where(judged, [ap(test_y[rows, c] > 0, scores[rows, c]) for c, rows in enumerate(kept)], np.nan)
        for ap in (area_ap, eleven_point_ap)
    )
    return SvmResult(
        100 * float(np.nanmean(area)),
        100 * float(np.nanmean(eleven)),
        area,
        eleven,
        costs[best],
        validation,
        max(cross_error, final_error),
        len(best) * (len(costs) * FOLDS + 1),
    )


class _Problems:
    """The training rows under every class, cost and fold.

    positive  bool [n, classes].  costs  float64 [costs].
    """

    def __init__(
        self, kernel: Gram | Features, positive: NDArray[np.bool_], costs: NDArray[np.float64], device: torch.device
    ):
        self._kernel, self._positive, self._costs = kernel, positive, costs
        self._labels = torch.from_numpy(np.where(positive, 1.0, -1.0)).to(device)[None]
        self._weights = torch.where(self._labels > 0, POSITIVE_WEIGHT, 1.0).double()
        # int64 [n, classes]: the fold that holds a row out
        self._held_out = np.stack([stratified_folds(column, FOLDS) for column in positive.T], axis=1)

    def cross_validated(self, track: Track) -> tuple[Tensor, float]:
        """Each fold's solutions, float64 [folds, n, classes, costs]: w = Xᵀβ; and the largest error."""
        n, classes = self._positive.shape
        betas = self._labels.new_zeros(FOLDS, n, classes, len(self._costs))
        error = 0.0
        steps = FOLDS * len(_blocks(classes)) * len(self._costs)
        for fold, rows, block, index, solution in track(self._fold_paths(), steps, "cross-validating costs"):
            betas[fold, rows[:, None], block, index] = solution.beta[0]
            error = max(error, float(solution.error.max()))
        return betas, error

    def _fold_paths(self) -> Iterator[tuple[int, Tensor, Tensor, int, Solution]]:
        """Each fold's path of costs: (fold, rows of the solution, its classes, index in costs, solution)."""
        device = self._labels.device
        for fold in range(FOLDS):
            inside = self._held_out != fold
            rows = torch.from_numpy(np.flatnonzero(inside.any(1))).to(device)
            part = self._kernel.among(rows)  # two thirds of the rows are four ninths of the matrix
            used = self._weights * torch.from_numpy(inside).to(device)
            for columns in _blocks(self._labels.shape[2]):
                block = torch.from_numpy(columns).to(device)
                labels, weights = (a[:, rows[:, None], block] for a in (self._labels, used))
                for index, solution in path(part, labels, weights, self._costs):
                    yield fold, rows, block, index, solution

    def precisions(self, betas: Tensor) -> NDArray[np.float64]:
        """Mean step AP of the held-out rows over the folds, float64 [classes, costs]."""
        n, classes = self._positive.shape
        scores = np.empty((n, classes, len(self._costs)))  # of each row by the fold that held it out
        for fold in range(FOLDS):
            decisions = self._kernel.product(betas[fold].flatten(1)[None]).view_as(betas[fold]).cpu().numpy()
            scores = np.where((self._held_out == fold)[..., None], decisions, scores)
        out = np.empty((classes, len(self._costs)))
        for c in range(classes):
            folds = [self._held_out[:, c] == fold for fold in range(FOLDS)]
            for i in range(len(self._costs)):
                out[c, i] = np.mean([step_ap(self._positive[rows, c], scores[rows, c, i]) for rows in folds])
        return out

    def refitted(self, betas: Tensor, best: NDArray[np.int64]) -> tuple[Tensor, float]:
        """Each class's solution at its best cost on all rows, float64 [1, n, classes], and the largest error."""
        beta, error = torch.empty_like(self._labels), 0.0
        for index in np.unique(best):  # each row is in all folds but one: their mean is near the optimum
            those = torch.from_numpy(np.flatnonzero(best == index)).to(beta.device)
            start = beginning(self._kernel, betas[:, :, those, index].sum(0, keepdim=True) / (FOLDS - 1))
            bounds = 2 * float(self._costs[index]) * self._weights[..., those]
            final = solve(self._kernel, self._labels[..., those], bounds, start)
            beta[..., those] = final.beta
            error = max(error, float(final.error.max()))
        return beta, error


def _blocks(classes: int) -> list[NDArray[np.int64]]:
    return np.array_split(np.arange(classes), -(-classes // _BLOCK_COLUMNS))


def decide(x: Tensor, beta: Tensor, parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """Decision values [m, P] of each part [m, D] by the solutions beta [n, P] on x [n, D]."""
    weights, intercept = x.mT @ beta, beta.sum(0)
    return (rows @ weights + intercept for rows in parts)
