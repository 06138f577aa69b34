"""Average precisions: three readings of the same ranking."""

import numpy as np
from numpy.typing import NDArray


def step_ap(positive: NDArray[np.bool_], scores: NDArray[np.float64]) -> float:
    """scikit-learn's average_precision_score: Σ (Rᵢ - Rᵢ₋₁) Pᵢ over distinct scores; 0 where nothing is positive.

    positive  bool [n]. scores  float64 [n], higher is more positive.
    """
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(positive[order])
    last_of_score = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    hits_there = hits[last_of_score]
    if not hits_there[-1]:
        return 0.0
    return float(np.sum(np.diff(hits_there, prepend=0) * hits_there / (last_of_score + 1)) / hits_there[-1])


def area_ap(positive: NDArray[np.bool_], scores: NDArray[np.float64]) -> float:
    """VOC 2010's area under the monotone envelope, as svm_helper.py of FAIR's benchmark ranks: no grouping of ties.

    Order: the reverse of numpy's default argsort. Not defined (nan) where nothing is positive.
    """
    precision, recall = _curve(positive, scores)
    precision = np.concatenate([[0.0], precision, [0.0]])
    recall = np.concatenate([[0.0], recall, [1.0]])
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    changes = np.flatnonzero(recall[1:] != recall[:-1])
    return float(np.sum((recall[changes + 1] - recall[changes]) * envelope[changes + 1]))


def eleven_point_ap(positive: NDArray[np.bool_], scores: NDArray[np.float64]) -> float:
    """VOC 2007's mean, over recalls 0, 0.1 ... 1, of the best precision at that recall or above; ranked as area_ap.

    Recalls are compared as tenths, so that three of ten positives are at 0.3. nan where nothing is positive.
    """
    precision, recall = _curve(positive, scores)
    if np.isnan(recall).any():
        return float("nan")
    tenths = np.round(10 * recall, 9)
    return float(np.mean([precision[tenths >= point].max(initial=0.0) for point in range(11)]))


def _curve(positive: NDArray[np.bool_], scores: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Precision and recall after each rank."""
    hits = np.cumsum(positive[np.argsort(scores)[::-1]])
    if not len(hits) or not hits[-1]:
        return np.full(len(hits), np.nan), np.full(len(hits), np.nan)
    return hits / np.arange(1, len(hits) + 1), hits / hits[-1]
