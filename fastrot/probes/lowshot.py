"""The low-shot SVMs of VOC07: few images a class, several draws, every cost."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fastrot.data.randomness import DRAW, philox
from fastrot.data.reading import mapped
from fastrot.errors import UserError
from fastrot.probes.kernel import Gram, gram
from fastrot.probes.precision import area_ap, step_ap
from fastrot.probes.progress import Track, silent
from fastrot.probes.svm import COSTS, FOLDS, POSITIVE_WEIGHT, normalised, path, stratified_folds

Job = TypeVar("Job")
Result = TypeVar("Result")
KS = (1, 2, 4, 8, 16, 32, 64, 96)
SAMPLES = 5
NEGATIVES = 19  # to one positive
_BLOCK_BYTES = 1 << 24  # of the Gram matrices solved together
_WORKERS = 4  # draws at once on a CPU: more would wait for Python


@dataclass(frozen=True)
class LowShotResult:
    """The table at one k; average precisions in percent, means over the classes that the test set has.

    test             float64 [samples, costs].
    oracle_cost      the cost whose mean over samples is highest on the test set itself: the protocol's choice.
    cross_validated  float64 [samples]: each class at the cost that cross-validation on its drawn images chose.
    chosen           float64 [samples, classes]: those costs.
    error            the largest distance of any solution from its optimum that the gradient allows.
    """

    k: int
    test: NDArray[np.float64]
    oracle_cost: float
    cross_validated: NDArray[np.float64]
    chosen: NDArray[np.float64]
    error: float


def draw(seed: int, sample: int, group: int, rows: ArrayLike, k: int) -> NDArray[np.int64]:
    """k of the given rows without replacement, ascending; a row's luck depends on (seed, sample, group, row) alone.

    group  2 · class for positives, 2 · class + 1 for negatives.
    """
    rows = np.asarray(rows, np.int64)
    words = philox(seed, rows, sample, DRAW, group).astype(np.uint64)
    luck = words[:, 0] << np.uint64(32) | words[:, 1]
    return np.sort(rows[np.argsort(luck, kind="stable")[:k]])


def drawn_targets(train_y: NDArray[np.integer], sample: int, k: int, seed: int) -> NDArray[np.int8] | None:
    """int8 [n, classes]: 1 for k drawn positives a class, 0 for 19 k negatives, -1 elsewhere; None if some class lacks them.

    train_y  int [n, classes]: 1 present, 0 absent, -1 difficult, never drawn.
    """
    targets = np.full(train_y.shape, -1, np.int8)
    for c, column in enumerate(train_y.T):
        for value, count, group in ((1, k, 2 * c), (0, NEGATIVES * k, 2 * c + 1)):
            rows = np.flatnonzero(column == value)
            if len(rows) < count:
                return None
            targets[draw(seed, sample, group, rows, count), c] = value
    return targets


def published_targets(folder: Path, sample: int, k: int, shape: tuple[int, int]) -> NDArray[np.int8] | None:
    """The fixed draws of FAIR's benchmark, train_targets_sample{1-5}_k{k}.npy; None where the file is not there.

    Raises UserError for a file that is no plain array of -1, 0 and 1 of this shape.
    """
    path = folder / f"train_targets_sample{sample + 1}_k{k}.npy"
    if not path.exists():
        return None
    try:
        targets: NDArray[np.int8] = mapped(path)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if targets.shape != shape or not np.isin(targets, (-1, 0, 1)).all():
        raise UserError(f"{path}: expected {shape[0]} x {shape[1]} of -1, 0 and 1, found {targets.shape}")
    return targets.astype(np.int8)


def low_shot(
    train_x: ArrayLike,
    train_y: ArrayLike,
    test_x: ArrayLike,
    test_y: ArrayLike,
    targets: Callable[[int, int], NDArray[np.int8] | None],
    ks: Sequence[int] = KS,
    samples: int = SAMPLES,
    costs: ArrayLike = COSTS,
    device: torch.device | str = "cpu",
    track: Track = silent,
) -> tuple[list[LowShotResult], list[int]]:
    """The low-shot protocol and, beside its oracle cost, one chosen without the test set; and the k left out.

    train_x, test_x  [n, D] of any real dtype; rows are normalised here.
    test_y           int [m, classes]: 1, 0, or -1 for difficult, dropped from its class's test.
    targets          (sample, k) -> int8 [n, classes] of 1, 0 and -1 (not drawn), or None: that k is left out.
    track            shows progress over an iterable: (items, total, title) -> items.

    The honest cost of a class is the first argmax of the mean step AP over min(3, k) stratified folds of
    the drawn images. At k = 1 nothing can be held out, all costs are equal, and the first listed is taken.
    """
    x, rows = normalised(train_x, device), normalised(test_x, device)
    if not (np.asarray(test_y) == 1).any():
        raise UserError("low-shot SVM: no class has a positive row in the test set")
    whole, cross = gram(x[None])[0], (x @ rows.mT).add_(1)
    costs, test_y = np.asarray(costs, np.float64), np.asarray(test_y)
    draws = {k: [t for sample in range(samples) if (t := targets(sample, k)) is not None] for k in ks}
    # the longest first, lest the last of them runs alone
    jobs = [(k, sample) for k in sorted(ks, reverse=True) if len(draws[k]) == samples for sample in range(samples)]
    parts: dict[int, list[_Part]] = {}

    def one(job: tuple[int, int]) -> tuple[int, _Part]:
        k, sample = job
        return k, _one_draw(whole, cross, draws[k][sample], test_y, costs, min(FOLDS, k))

    for k, part in track(_side_by_side(one, jobs, whole.device), len(jobs), "low-shot draws"):
        parts.setdefault(k, []).append(part)
    results = [_table(k, parts[k], costs) for k in ks if k in parts]
    return results, [k for k in ks if k not in parts]


class _Part(NamedTuple):
    """Of one draw: test AP float64 [classes, costs], the index of each class's cross-validated cost [classes], and
    the largest error."""

    precisions: NDArray[np.float64]
    chosen: NDArray[np.int64]
    error: float


def _table(k: int, parts: list[_Part], costs: NDArray[np.float64]) -> LowShotResult:
    per_class, chosen = np.stack([part.precisions for part in parts]), np.stack([part.chosen for part in parts])
    test = 100 * np.nanmean(per_class, axis=1)
    honest = np.take_along_axis(per_class, chosen[..., None], 2)[..., 0]
    oracle = float(costs[test.mean(0).argmax()])
    error = max(part.error for part in parts)
    return LowShotResult(k, test, oracle, 100 * np.nanmean(honest, axis=1), costs[chosen], error)


def _side_by_side(work: Callable[[Job], Result], jobs: Iterable[Job], device: torch.device) -> Iterator[Result]:
    """work(job) of each, in order. Threads share a CPU's cores: several small problems fill them better than one."""
    threads = torch.get_num_threads()
    workers = min(threads, _WORKERS) if device.type == "cpu" else 1
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,)) as pool:
            yield from pool.map(work, jobs)
    finally:
        torch.set_num_threads(threads)  # each thread has its own number, but a new one takes the last that was set


def _one_draw(
    whole: Tensor,
    cross: Tensor,
    targets: NDArray[np.int8],
    test_y: NDArray[np.integer],
    costs: NDArray[np.float64],
    folds: int,
) -> _Part:
    count = int((targets >= 0).sum(0).max())
    drawn = np.argsort(targets < 0, axis=0, kind="stable")[:count].T  # [classes, count], ascending, the undrawn last
    kinds = np.take_along_axis(targets.T, drawn, 1)
    folds = folds if folds > 1 else 0
    held_out = np.full(kinds.shape, -1)
    for c, kind in enumerate(kinds):
        if folds:
            held_out[c, kind >= 0] = stratified_folds(kind[kind >= 0] == 1, folds)
    weights = np.where(kinds == 1, POSITIVE_WEIGHT, 1.0) * (kinds >= 0)
    inside = np.stack([held_out != fold for fold in range(folds)] + [np.ones_like(held_out, bool)], axis=2)
    inside = weights[:, :, None] * inside

    device, classes = whole.device, len(kinds)
    used = torch.from_numpy(np.flatnonzero((targets >= 0).any(1))).to(device)
    betas = torch.zeros(len(costs), classes, len(whole), dtype=whole.dtype, device=device)  # of all drawn images
    validation, errors = np.zeros((classes, len(costs))), []
    step = max(1, _BLOCK_BYTES // (8 * count**2))
    for first in range(0, classes, step):
        block = slice(first, first + step)
        rows = torch.from_numpy(drawn[block].copy()).to(device)  # row by row: so will the Gram matrices lie
        labels = torch.from_numpy(np.where(kinds[block] == 1, 1.0, -1.0)).to(device)[..., None]
        kernel = Gram(whole[rows[:, :, None], rows[:, None, :]])
        for i, solution in path(kernel, labels, torch.from_numpy(inside[block]).to(device), costs):
            errors.append(float(solution.error.max()))
            betas[i, block].scatter_(1, rows, solution.beta[..., folds])
            scores = solution.scores.cpu().numpy()
            for at, c in enumerate(range(classes)[block]):
                for fold in range(folds):
                    out = held_out[c] == fold
                    validation[c, i] += step_ap(kinds[c, out] == 1, scores[at, out, fold])
    decisions = (betas[..., used].flatten(0, 1) @ cross[used]).unflatten(0, betas.shape[:2]).cpu().numpy()
    average = np.empty((classes, len(costs)))
    for c, column in enumerate(test_y.T):
        kept = column != -1
        average[c] = [area_ap(column[kept] > 0, test[c, kept]) for test in decisions]
    return _Part(average, validation.argmax(1), max(errors))
