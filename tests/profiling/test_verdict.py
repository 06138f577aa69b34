"""The verdict of planted cases, and predictions against a simulated training of other parts."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastrot.profiling.verdict import Ceiling, Stages, held, judge, ratio

CORES = 4.0


def steady(pace: float, cpu_s: float = 1e-4) -> Ceiling:
    return Ceiling([pace / 1.02, pace, pace / 0.98], [cpu_s])


def trained(data: Ceiling, step: Ceiling, cores: float = CORES) -> float:
    """A training of these parts, second by second: whichever is late holds the other up, and cores are shared out."""
    images, seconds = 0.0, 0.0
    for _ in range(100):
        took = max(1 / data.pace, 1 / step.pace, (data.cpu_s + step.cpu_s) / cores)
        images, seconds = images + 1, seconds + took
    return images / seconds


def stages(**parts) -> Stages:
    usual = {
        "cold": steady(9000),
        "warm": steady(20000),
        "decode": steady(3000),
        "data": steady(2900),
        "step": steady(500),
        "waits": 0.0,
    }
    parts = usual | parts
    path = {name: parts.pop(name) for name in ("cold", "warm", "decode")}
    parts.setdefault("both", steady(trained(parts["data"], parts["step"])))
    return Stages(CORES, **parts, path=path)


@pytest.mark.parametrize(
    "planted, bound, stage, following",
    [
        ({}, "step", "step", "decode"),
        ({"cold": steady(120), "data": steady(118)}, "data", "cold", "step"),
        ({"cold": steady(120), "data": steady(118), "decode": steady(300)}, "data", "cold", "decode"),
        ({"decode": steady(210), "data": steady(200)}, "data", "decode", "step"),
        ({"cold": steady(9000), "warm": steady(230), "data": steady(220)}, "data", "warm", "step"),
        ({"cold": steady(230), "warm": steady(235), "data": steady(220)}, "data", "reads", "step"),
        ({"data": steady(900, 3e-3), "step": steady(800, 4e-3)}, "cores", "step", "step"),
        ({"data": steady(900, 5e-3), "step": steady(800, 2e-3)}, "cores", "decode", "step"),
        ({"both": steady(300), "waits": 0.4}, "ahead", "ahead", "step"),
        ({"apart": 0.7}, "step", "between", "step"),
    ],
)
def test_a_planted_bound_is_named_with_what_comes_next(planted, bound, stage, following):
    found = judge(stages(**planted))
    assert (found.bound, found.stage, found.next) == (bound, stage, following)
    assert found.reached == pytest.approx(0.6 if bound == "ahead" else 1) and found.next_pace >= found.bound_pace
    assert found.gain[1] == pytest.approx(found.next_pace / (300 if bound == "ahead" else found.bound_pace))


PARTS = st.builds(steady, st.floats(10, 10_000), st.floats(1e-5, 1e-2))


@given(PARTS, PARTS, PARTS, st.booleans())
def test_a_predicted_gain_is_what_the_changed_training_gives(data, step, new, of_the_step):
    now = stages(data=data, step=step)
    predicted = now.gain(replace(now, **{"step" if of_the_step else "data": new}))
    pair = (data, new) if of_the_step else (new, step)
    assert predicted[1] == pytest.approx(trained(*pair) / trained(data, step))
    assert predicted[0] <= predicted[1] <= predicted[2]


def test_a_step_that_waits_for_even_batches_is_no_matter_of_loading_ahead():
    assert judge(stages(both=steady(300), waits=0.4, deeper=1.0)).bound == "step"


def test_bursts_count_by_the_time_they_take():
    """Ten images in 1 s, ten in 9 s: 2 images/s, whatever the median of the laps."""
    bursts = Ceiling([10.0, 10 / 9], [1.0, 1.0])
    assert bursts.pace == pytest.approx(2)
    assert ratio([20.0, 20 / 9], bursts.paces) == pytest.approx((2, 2, 2))


@pytest.mark.parametrize(
    "achieved, good", [((1.4, 1.5, 1.6), True), ((1.0, 1.02, 1.05), False), ((2.2, 2.4, 2.6), False)]
)
def test_a_prediction_that_failed_is_told_from_one_that_held(achieved, good):
    assert held((1.45, 1.5, 1.55), achieved) is good
