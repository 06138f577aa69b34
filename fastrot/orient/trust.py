"""How far answers can be believed, and from which confidence on they count: scores in, numbers out.

Scores are what `combined` gives of upright images, [n, 4]. They turn with the image, bit for bit, so that the four turns
of an image are one case: class 0 is right.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from fastrot.orient.answers import normalised

Floats = NDArray[np.float64]
COVERAGES = (0.5, 0.8, 0.9, 0.95, 0.99, 1.0)
RISK = 0.01  # of the answers that count, the share that may be wrong
MISTAKEN = 0.05  # of the pictures without an up, the share that may get an answer
_BINS = 15
_TENTHS = 10
WIDEST = np.log(20)  # of the logarithm of a temperature, either way


@dataclass(frozen=True)
class Bin:
    """Answers of about the same confidence: how many, their mean confidence, the share that is right."""

    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Chosen:
    """What makes answers of scores: they are divided by `temperature`; from `threshold` on an answer counts."""

    temperature: float
    threshold: float


def fit_temperature(scores: Floats, labels: NDArray[np.int64]) -> float:
    """By what scores [n, 4] are divided so that the softmax gives the labels [n] the least cross-entropy; 1/20 to 20."""

    def loss(log_temperature: float) -> float:
        return cross_entropy(normalised(scores, np.exp(log_temperature)), labels)

    found = optimize.minimize_scalar(loss, bounds=(-WIDEST, WIDEST), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def cross_entropy(log_probabilities: Floats, labels: NDArray[np.int64]) -> float:
    """Mean over the rows of [n, 4], in nats."""
    return float(-log_probabilities[np.arange(len(labels)), labels].mean())


def reliability(confidence: Floats, right: NDArray[np.bool_]) -> list[Bin]:
    """Fifteen bins of equal width over (0, 1], those that hold an answer, ascending."""
    of = np.searchsorted(np.linspace(0, 1, _BINS + 1)[1:-1], confidence)
    groups = [of == at for at in np.unique(of)]
    return [Bin(int(g.sum()), float(confidence[g].mean()), float(right[g].mean())) for g in groups]


def calibration_error(confidence: Floats, right: NDArray[np.bool_]) -> float:
    """The expected calibration error, 0 to 1: how far confidence is from the share that is right, over the bins."""
    return sum(one.count * abs(one.confidence - one.accuracy) for one in reliability(confidence, right)) / len(right)


def risk_at_coverage(confidence: Floats, right: NDArray[np.bool_], coverages: Sequence[float]) -> list[float]:
    """The share that is wrong among the surest ceil(coverage * n) answers; equally sure ones share their errors."""
    _, group = np.unique(-confidence, return_inverse=True)
    shared = np.bincount(group, ~right) / np.bincount(group)
    wrong = np.cumsum(shared[np.sort(group)])
    taken = [max(1, int(np.ceil(coverage * len(right) - 1e-9))) for coverage in coverages]
    return [float(wrong[k - 1] / k) for k in taken]


def threshold(confidence: Floats, right: NDArray[np.bool_], without_up: Floats | None = None) -> float:
    """The least confidence from which at most RISK of the answers are wrong, and at most MISTAKEN of the pictures
    without an up, of confidences `without_up`, get one; 1 where there is none.

    The risk is Laplace's, (wrong + 1) / (answers + 2): few answers that happen to be right promise nothing.
    """
    levels, group = np.unique(-confidence, return_inverse=True)
    risk = (np.cumsum(np.bincount(group, ~right)) + 1) / (np.cumsum(np.bincount(group)) + 2)
    fine = np.flatnonzero(risk <= RISK)
    least = float(-levels[fine[-1]]) if len(fine) else 1.0
    if without_up is not None:
        first_refused = np.sort(without_up)[::-1][int(MISTAKEN * len(without_up))]
        least = max(least, float(np.nextafter(first_refused, 2)))
    return min(least, 1.0)


def choose(scores: Floats, without_up: Floats | None = None) -> Chosen:
    """A temperature from the scores of upright images, and a threshold from these and, where there are some, from the
    scores of pictures without an up."""
    temperature = fit_temperature(scores, np.zeros(len(scores), np.int64))
    others = None if without_up is None else _confidence(without_up, temperature)
    return Chosen(temperature, threshold(_confidence(scores, temperature), is_right(scores), others))


def is_right(scores: Floats) -> NDArray[np.bool_]:
    """Whether upright is the one likeliest turn, [n]."""
    right: NDArray[np.bool_] = scores[:, 0] > scores[:, 1:].max(1)
    return right


def _confidence(scores: Floats, temperature: float | Floats) -> Floats:
    of: Floats = np.exp(normalised(scores / np.reshape(temperature, (-1, 1))).max(1))
    return of


@dataclass(frozen=True)
class Judged:
    """What answers to upright images are worth. figures: JSON values. before, after: reliability; curve: (coverage,
    risk)."""

    figures: dict[str, Any]
    before: list[Bin]
    after: list[Bin]
    curve: list[tuple[float, float]]


def judge(scores: Floats, chosen: Chosen, without_up: Floats | None = None) -> Judged:
    """What was chosen elsewhere, on these images."""
    return _judged(scores, [chosen], without_up)


def judge_by_tenths(scores: Floats, without_up: Floats | None = None) -> Judged:
    """What choosing is worth on images that it has not seen: every tenth image by what the nine tenths chose."""

    def others(rows: Floats, at: int) -> Floats:
        return np.delete(rows, np.s_[at::_TENTHS], 0)

    chosen = [
        choose(others(scores, at), None if without_up is None else others(without_up, at)) for at in range(_TENTHS)
    ]
    return _judged(scores, chosen, without_up)


def _judged(scores: Floats, chosen: list[Chosen], without_up: Floats | None) -> Judged:
    """Row r by chosen[r % len(chosen)]."""

    def by_row(rows: int, name: str) -> Floats:
        return np.resize([getattr(one, name) for one in chosen], rows).astype(np.float64)

    n, right = len(scores), is_right(scores)
    temperatures, least = by_row(n, "temperature"), by_row(n, "threshold")
    raw, sure = _confidence(scores, 1), _confidence(scores, temperatures)
    decided = sure >= least
    wrong = int((decided & ~right).sum())
    labels = np.zeros(n, np.int64)
    figures: dict[str, Any] = {
        "images": n,
        "accuracy": float(right.mean()),
        "accuracy_interval": interval(int(right.sum()), n),
        "cross_entropy": [
            cross_entropy(normalised(scores), labels),
            cross_entropy(normalised(scores / temperatures[:, None]), labels),
        ],
        "calibration_error": [calibration_error(raw, right), calibration_error(sure, right)],
        "risk": dict(zip(map(str, COVERAGES), risk_at_coverage(sure, right, COVERAGES), strict=True)),
        "decided": float(decided.mean()),
        "wrong_of_decided": float(wrong / decided.sum()) if decided.any() else None,
        "wrong_of_decided_interval": interval(wrong, int(decided.sum())) if decided.any() else None,
    }
    if without_up is not None:
        m = len(without_up)
        answered = int((_confidence(without_up, by_row(m, "temperature")) >= by_row(m, "threshold")).sum())
        figures["without_up"] = {
            "pictures": m,
            "answered": answered / m,
            "answered_interval": interval(answered, m),
        }
    at = np.linspace(0.01, 1, 100).tolist()
    curve = list(zip(at, risk_at_coverage(sure, right, at), strict=True))
    return Judged(figures, reliability(raw, right), reliability(sure, right), curve)


def interval(count: int, of: int) -> list[float]:
    """Wilson's 95% interval of a share."""
    found = stats.binomtest(count, of).proportion_ci(0.95, "wilson")
    return [float(found.low), float(found.high)]
