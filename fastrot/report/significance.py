"""Figures with their intervals, and whether two differ: what the page may call a difference.

An accuracy has Wilson's interval; two accuracies on the same images are compared by McNemar's exact test, and by
Fisher's where no one knows which images were right. A mean over classes (mAP) has a bootstrap over the classes, and
Wilcoxon's signed-rank test a class; a mean over draws Student's interval and paired test. All at 95 %.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

ALPHA = 0.01  # a page makes dozens of comparisons
_LEVEL = 0.95
_RESAMPLES = 10_000


@dataclass(frozen=True)
class Figure:
    """A measured figure in percent, its interval where there is one, and how many things it is a mean of.

    each  what a paired test needs: right or wrong an image, AP a class, mAP a draw; None where it is not kept.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    each: NDArray[np.float64] | None = None

    @property
    def band(self) -> tuple[float, float]:
        """The interval; where there is none, the figure itself."""
        return (self.value, self.value) if self.low is None or self.high is None else (self.low, self.high)

    def plain(self) -> dict[str, float | None]:
        """As JSON holds it."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


def accuracy(right: int, n: int, each: str | None = None) -> Figure:
    """A share of n images, with Wilson's interval. each: a character an image, 1 where it is right."""
    interval = stats.binomtest(right, n).proportion_ci(_LEVEL, "wilson")
    marks = np.array([mark == "1" for mark in each], np.float64) if each else None
    return Figure(100 * right / n, 100 * interval.low, 100 * interval.high, n, marks)


def over_classes(precisions: Sequence[float | None]) -> Figure:
    """Mean AP, with a bootstrap over the classes that have one. precisions: percent; None or nan for the others."""
    each = np.array([np.nan if one is None else one for one in precisions], np.float64)
    known = each[~np.isnan(each)]
    resampled = known[np.random.default_rng(0).integers(len(known), size=(_RESAMPLES, len(known)))].mean(1)
    low, high = np.percentile(resampled, [50 * (1 - _LEVEL), 50 * (1 + _LEVEL)])
    return Figure(float(known.mean()), float(low), float(high), len(known), each)


def over(values: ArrayLike) -> Figure:
    """A mean over independent things (draws; images with several views each), with Student's interval; percent."""
    each = np.asarray(values, np.float64)
    mean, error = float(each.mean()), float(stats.sem(each)) if len(each) > 1 else 0.0
    half = error * float(stats.t.ppf((1 + _LEVEL) / 2, max(1, len(each) - 1)))
    return Figure(mean, mean - half, mean + half, len(each), each)


def same_images(one: Figure, other: Figure) -> float:
    """p that two accuracies are one: McNemar's exact test, or Fisher's where the images are not known."""
    if one.each is None or other.each is None or len(one.each) != len(other.each):
        right = [round(figure.value * figure.n / 100) for figure in (one, other)]
        return float(stats.fisher_exact([right, [one.n - right[0], other.n - right[1]]]).pvalue)
    gained, lost = int((one.each > other.each).sum()), int((one.each < other.each).sum())
    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def same_classes(one: Figure, other: Figure) -> float | None:
    """p that two mean APs are one: Wilcoxon's signed-rank test over the classes."""
    if one.each is None or other.each is None or len(one.each) != len(other.each):
        return None
    difference = one.each - other.each
    difference = difference[~np.isnan(difference)]
    return float(stats.wilcoxon(difference).pvalue) if difference.any() else 1.0


def same_draws(one: Figure, other: Figure) -> float | None:
    """p that two means over the same draws are one: Student's paired test."""
    if one.each is None or other.each is None or len(one.each) != len(other.each) or len(one.each) < 2:
        return None
    difference = one.each - other.each
    if np.ptp(difference) == 0:
        return 1.0 if not difference.any() else 0.0
    return float(stats.ttest_1samp(difference, 0).pvalue)
