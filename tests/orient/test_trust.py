"""Calibration against scikit-learn and plain loops; its laws by hypothesis."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss

from fastrot.orient import trust
from fastrot.orient.answers import normalised

answers = st.lists(st.tuples(st.sampled_from((0.25, 0.3, 0.5, 0.6, 0.99, 1.0)) | st.floats(0.25, 1), st.booleans()),
                   min_size=1, max_size=40)  # fmt: skip


def drawn(n, sharper=1.0, spread=2.0, seed=0):
    """Scores whose softmax is right as often as it says, then made sharper; labels."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(0, spread, (n, 4))
    labels = np.array([rng.choice(4, p=row) for row in np.exp(normalised(scores))])
    return scores * sharper, labels


def upright(scores, labels):
    """The same cases with the true class first."""
    return np.stack([np.roll(row, -label) for row, label in zip(scores, labels, strict=True)])


def columns(found):
    confidence, right = zip(*found, strict=True)
    return np.array(confidence), np.array(right)


@pytest.mark.parametrize("sharper", [0.3, 1, 4])
def test_the_temperature_that_was_planted_is_found_and_none_is_better(sharper):
    scores, labels = drawn(5000, sharper)
    found = trust.fit_temperature(scores, labels)
    assert found == pytest.approx(sharper, rel=0.05)
    grid = [log_loss(labels, np.exp(normalised(scores, t))) for t in found * np.geomspace(0.5, 2, 21)]
    assert log_loss(labels, np.exp(normalised(scores, found))) <= min(grid) + 1e-9
    assert trust.cross_entropy(normalised(scores, found), labels) == pytest.approx(
        log_loss(labels, np.exp(normalised(scores, found)))
    )


def test_a_reliability_diagram_is_scikit_learns():
    scores, labels = drawn(3000, 3)
    p = np.exp(normalised(scores))
    confidence, right = p.max(1), p.argmax(1) == labels
    share, mean = calibration_curve(right, confidence, n_bins=15)
    found = trust.reliability(confidence, right)
    assert [one.accuracy for one in found] == pytest.approx(share.tolist())
    assert [one.confidence for one in found] == pytest.approx(mean.tolist())
    assert sum(one.count for one in found) == 3000
    weights = np.array([one.count for one in found]) / 3000
    assert trust.calibration_error(confidence, right) == pytest.approx((weights * abs(share - mean)).sum())


def risk_by_hand(confidence, right, coverage):
    """The mean over all orders of equally sure answers, each an order by itself: their errors are spread evenly."""
    left, wrong = math.ceil(coverage * len(right) - 1e-9) or 1, 0.0
    taken = left
    for level in sorted(set(confidence.tolist()), reverse=True):
        same = [ok for c, ok in zip(confidence.tolist(), right.tolist(), strict=True) if c == level]
        use = min(left, len(same))
        wrong += use * same.count(False) / len(same)
        left -= use
    return wrong / taken


@settings(deadline=None, max_examples=80)
@given(answers, st.floats(0.01, 1))
def test_risk_at_coverage_is_that_of_a_plain_loop(found, coverage):
    confidence, right = columns(found)
    got = trust.risk_at_coverage(confidence, right, [coverage, 1.0])
    assert got[0] == pytest.approx(risk_by_hand(confidence, right, coverage))
    assert got[1] == pytest.approx(np.mean(~right)), "everything covered: the error rate"


@settings(deadline=None, max_examples=80)
@given(answers)
def test_a_calibration_error_is_a_share(found):
    assert 0 <= trust.calibration_error(*columns(found)) <= 1


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 2**32 - 1), st.floats(0.05, 20))
def test_a_temperature_keeps_the_likeliest_turn(seed, temperature):
    scores = np.random.default_rng(seed).normal(0, 5, (8, 4))
    assert (normalised(scores, temperature).argmax(1) == scores.argmax(1)).all()


@settings(deadline=None, max_examples=80)
@given(answers, st.lists(st.floats(0.25, 1), min_size=1, max_size=50))
def test_the_threshold_keeps_both_promises_and_is_the_least_that_does(found, others):
    confidence, right = columns(found * 10)
    without_up = np.array(others)

    def keeps(least):
        decided = confidence >= least
        return (not decided.any() or ((~right[decided]).sum() + 1) / (decided.sum() + 2) <= trust.RISK) and (
            (without_up >= least).mean() <= trust.MISTAKEN
        )

    least = trust.threshold(confidence, right, without_up)
    assert keeps(least) or least == 1
    kept = [level for level in [*confidence.tolist(), *without_up.tolist()] if level < least and keeps(level)]
    decided = [int((confidence >= level).sum()) for level in kept]
    assert all(count == 0 for count in decided) or max(decided) <= (confidence >= least).sum()


def test_tenths_are_judged_by_what_the_other_nine_chose():
    scores, labels = drawn(4000, 1.5)
    scores = upright(scores, labels)
    scores[::10] *= 3  # the tenths differ, so that a tenth's own temperature would show
    judged = trust.judge_by_tenths(scores)
    p = np.empty_like(scores)
    for mine in range(10):
        others = np.delete(scores, np.s_[mine::10], 0)
        p[mine::10] = np.exp(normalised(scores[mine::10], trust.fit_temperature(others, np.zeros(3600, int))))
    assert judged.figures["cross_entropy"] == pytest.approx(
        [log_loss(np.zeros(4000, int), q, labels=range(4)) for q in (np.exp(normalised(scores)), p)]
    )


def test_what_is_judged_adds_up():
    scores, labels = drawn(4000, 3, spread=5)
    scores, flat = upright(scores, labels), np.random.default_rng(1).normal(0, 0.5, (200, 4))
    chosen = trust.choose(scores, flat)
    judged = trust.judge(scores, chosen, flat)
    figures = judged.figures
    assert figures["accuracy"] == pytest.approx((scores.argmax(1) == 0).mean())
    assert figures["risk"]["1.0"] == pytest.approx(1 - figures["accuracy"])
    before, after = figures["calibration_error"]
    assert after < 0.03 < before
    assert figures["wrong_of_decided"] <= trust.RISK and figures["without_up"]["answered"] <= trust.MISTAKEN
    assert 0.05 < figures["decided"] < 1 and judged.curve[-1] == (1, pytest.approx(figures["risk"]["1.0"]))


def test_an_image_that_looks_alike_in_two_turns_is_not_right():
    assert trust.is_right(np.array([[1.0, 1, 0, 0], [2, 1, 0, 0], [0, 1, 0, 0]])).tolist() == [False, True, False]
