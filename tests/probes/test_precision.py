"""Average precisions against scikit-learn and against svm_helper.py written out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from fastrot.probes.precision import area_ap, eleven_point_ap, step_ap

RANKINGS = st.lists(st.tuples(st.booleans(), st.integers(-4, 4)), min_size=1, max_size=60).filter(
    lambda pairs: any(positive for positive, _ in pairs)
)


def arrays(pairs):
    return np.array([p for p, _ in pairs]), np.array([s / 4 for _, s in pairs])


def reference_area(positive, scores):
    """svm_helper.py's calculate_ap and get_precision_recall, loop for loop."""
    order = np.argsort(scores)[::-1]
    true = false = 0
    precision, recall = [0.0], [0.0]
    for i in order:
        true, false = true + bool(positive[i]), false + (not positive[i])
        precision.append(true / (true + false))
        recall.append(true / positive.sum())
    precision, recall = precision + [0.0], recall + [1.0]
    for i in range(len(precision) - 1, 0, -1):
        precision[i - 1] = max(precision[i - 1], precision[i])
    return sum((recall[i] - recall[i - 1]) * precision[i] for i in range(1, len(recall)) if recall[i] != recall[i - 1])


def reference_eleven(positive, scores):
    order = np.argsort(scores)[::-1]
    hits = np.cumsum(positive[order])
    total = 0.0
    for point in range(11):
        best = 0.0
        for i in range(len(order)):
            if 10 * hits[i] >= point * hits[-1]:
                best = max(best, hits[i] / (i + 1))
        total += best / 11
    return total


@given(RANKINGS)
def test_step_ap_is_scikit_learns_ties_and_all(pairs):
    positive, scores = arrays(pairs)
    assert step_ap(positive, scores) == pytest.approx(average_precision_score(positive, scores), abs=1e-12)


@given(RANKINGS)
def test_area_ap_is_the_scripts_with_its_own_order_of_ties(pairs):
    positive, scores = arrays(pairs)
    assert area_ap(positive, scores) == pytest.approx(reference_area(positive, scores), abs=1e-12)


@given(RANKINGS)
def test_eleven_points_are_voc_2007s(pairs):
    positive, scores = arrays(pairs)
    assert eleven_point_ap(positive, scores) == pytest.approx(reference_eleven(positive, scores), abs=1e-12)


@given(RANKINGS)
def test_the_envelope_is_never_below_the_steps_where_no_scores_tie(pairs):
    positive, scores = arrays(pairs)
    scores = scores + np.arange(len(scores)) * 1e-6
    assert area_ap(positive, scores) >= step_ap(positive, scores) - 1e-12


def test_without_a_positive_row_there_is_no_area():
    assert np.isnan(area_ap(np.zeros(3, bool), np.arange(3.0)))
    assert np.isnan(eleven_point_ap(np.zeros(3, bool), np.arange(3.0)))
    assert step_ap(np.zeros(3, bool), np.arange(3.0)) == 0
