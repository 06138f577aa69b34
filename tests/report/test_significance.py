"""Intervals and tests of the page's figures, against formulas worked out by hand and against each other."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastrot.report.significance import Figure, accuracy, over, over_classes, same_classes, same_draws, same_images


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_an_accuracys_interval_is_wilsons(counts):
    right, n = counts
    z, share = 1.959963984540054, right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    found = accuracy(right, n)
    assert (found.low, found.high) == pytest.approx((100 * (middle - half), 100 * (middle + half)), abs=1e-6)
    assert found.n == n and found.low <= found.value + 1e-9 and found.value <= found.high + 1e-9


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_the_paired_test_is_mcnemars_exact_one(pairs):
    marks = ["".join("01"[pair[side]] for pair in pairs) for side in (0, 1)]
    one, other = (accuracy(text.count("1"), len(text), text) for text in marks)
    gained, lost = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    n = gained + lost
    tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1)) / 2**n
    assert same_images(one, other) == pytest.approx(min(1.0, 2 * tail))


def test_one_image_of_two_hundred_is_no_difference():
    marks = "1" * 100 + "0" * 100
    one, other = accuracy(101, 200, marks.replace("10", "11", 1)), accuracy(100, 200, marks)
    assert one.value - other.value == 0.5 and same_images(one, other) == 1.0


def test_pairing_sees_what_two_shares_alone_cannot():
    other = "1" * 50 + "0" * 50
    one = "1" * 60 + "0" * 40
    paired = same_images(accuracy(60, 100, one), accuracy(50, 100, other))
    assert paired == pytest.approx(2 / 2**10) and same_images(accuracy(60, 100), accuracy(50, 100)) > 0.1


def test_mean_ap_is_resampled_over_its_classes_and_tested_over_them():
    each = np.arange(20.0)
    found = over_classes([*each, None])
    assert found.value == each.mean() and found.n == 20 and len(found.each) == 21
    error = each.std() / 20**0.5
    assert (found.low, found.high) == pytest.approx((9.5 - 1.96 * error, 9.5 + 1.96 * error), abs=0.15)
    better = over_classes([*(each + 1 + each / 100), None])
    assert same_classes(better, found) == pytest.approx(2 / 2**20), "all of twenty ranks have one sign"
    assert same_classes(found, found) == 1.0
    assert same_classes(found, over_classes([1.0])) is None


def test_draws_have_students_interval_and_paired_test():
    one = over([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.7764451051977987 * np.std(one.each, ddof=1) / 5**0.5
    assert (one.low, one.high) == pytest.approx((3 - half, 3 + half))
    shifted = over([2.1, 2.9, 4.1, 4.9, 6.0])
    assert same_draws(shifted, one) < 1e-3 and same_draws(one, one) == 1.0
    assert same_draws(one, Figure(3, 2, 4, 5)) is None
