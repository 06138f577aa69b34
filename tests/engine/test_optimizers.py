"""Optimisers against plain arithmetic, schedules against the protocol and torch's own."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastrot.engine.optimizers import build_optimizer, clip_and_measure
from fastrot.engine.schedules import lr_at

RECIPE = dict(epochs=70, peak=0.2, schedule="step", warmup_epochs=5, warmup_ratio=0.1, milestones=(30, 50), gamma=0.1)


def test_the_recipes_rate_at_every_place_the_protocol_names():
    per_epoch = 10_010
    warmup = 5 * per_epoch
    for t in (0, 1, 777, warmup - 1):
        assert lr_at(t / per_epoch, **RECIPE) == pytest.approx(0.2 * (1 - 0.9 * (1 - t / warmup)), rel=1e-12)
    for epoch, rate in ((5, 0.2), (29.9999, 0.2), (30, 0.02), (49.9999, 0.02), (50, 0.002), (70, 0.002)):
        assert lr_at(epoch, **RECIPE) == pytest.approx(rate, rel=1e-12)


def test_cosine_is_torchs_cosine():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.4)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.01)
    for step in range(51):
        assert lr_at(step, epochs=50, peak=0.4, schedule="cosine", final=0.01) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_poly_is_the_protocols_poly():
    for t in (0, 100, 19_999, 20_000):
        want = (0.01 - 1e-4) * (1 - t / 20_000) ** 0.9 + 1e-4
        assert lr_at(t, epochs=20_000, peak=0.01, schedule="poly", power=0.9, final=1e-4) == pytest.approx(want)


def closed_form(epoch, schedule, epochs, peak, milestones, gamma, power, final, warmup, ratio):
    """The schedules as their papers and mmcv's hooks write them, from the start to the end."""
    rate = {
        "step": lambda: peak * math.prod(gamma for m in milestones if m <= epoch),
        "cosine": lambda: (
            final + (peak - final) * math.cos(math.pi / 2 * max(0, epoch - warmup) / (epochs - warmup)) ** 2
        ),
        "poly": lambda: final + (peak - final) * (1 - epoch / epochs) ** power,
    }[schedule]()
    return rate * (ratio + (1 - ratio) * epoch / warmup) if epoch < warmup else rate


@given(
    st.sampled_from(["step", "cosine", "poly"]),
    st.floats(1, 200),
    st.floats(0, 0.99),
    st.floats(0, 1),
    st.floats(0, 1.5),
    st.lists(st.floats(0, 1.2), max_size=3),
    st.floats(0, 1),
    st.floats(0.5, 3),
    st.floats(0, 1),
)
def test_every_schedule_after_every_warm_up_is_its_closed_form_and_stays_at_its_end(
    schedule, epochs, warmup, ratio, at, milestones, gamma, power, final
):
    """Warm-up, milestones and `at` in parts of the run; milestones may lie past its end."""
    milestones, words = tuple(m * epochs for m in milestones), (schedule, epochs, 0.3)
    warmup = 0.0 if warmup * epochs < 1e-3 else warmup * epochs
    rate = lr_at(
        at * epochs, epochs=epochs, peak=0.3, schedule=schedule, warmup_epochs=warmup, warmup_ratio=ratio,
        milestones=milestones, gamma=gamma, power=power, final=final,
    )  # fmt: skip
    want = closed_form(min(at, 1) * epochs, *words, milestones, gamma, power, final, warmup, ratio)
    assert rate == pytest.approx(want, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("schedule, end", [("step", 0.002), ("cosine", 0.01), ("poly", 0.01)])
def test_the_rate_at_the_end_and_past_it(schedule, end):
    for epoch in (70, 70.0001, 71, 1000):
        assert lr_at(epoch, **RECIPE | {"schedule": schedule, "final": 0.01}) == pytest.approx(end, rel=1e-12)


def test_a_rate_outside_the_run_is_refused():
    with pytest.raises(ValueError, match="below 0"):
        lr_at(-1, **RECIPE)
    with pytest.raises(ValueError, match="none of step"):
        lr_at(0, epochs=1, peak=1, schedule="linear")


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2))


def steps(model, optimizer, count=3):
    for i in range(count):
        optimizer.zero_grad()
        x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(i))
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay_norms", [False, True])
def test_sgd_decays_what_it_is_told_to(nesterov, decay_norms):
    ours, theirs = small_model(), small_model()
    mine = build_optimizer(
        "sgd", ours, lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.05, decay_norms=decay_norms, trust=0.001
    )
    vectors = [p for p in theirs.parameters() if p.ndim <= 1]
    matrices = [p for p in theirs.parameters() if p.ndim > 1]
    plain = torch.optim.SGD(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.05 * decay_norms}],
        lr=0.1,
        momentum=0.9,
        nesterov=nesterov,
        weight_decay=0.05,
        foreach=False,
    )
    steps(ours, mine)
    steps(theirs, plain)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_lars_is_its_papers_arithmetic():
    model = small_model()
    reference = copy.deepcopy(model)
    optimizer = build_optimizer(
        "lars", model, lr=2.0, momentum=0.9, nesterov=False, weight_decay=0.01, decay_norms=False, trust=0.02
    )
    momenta = [torch.zeros_like(p) for p in reference.parameters()]
    for i in range(3):
        x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        for p in reference.parameters():
            p.grad = None
        reference(x).square().mean().backward()
        with torch.no_grad():
            for p, v in zip(reference.parameters(), momenta, strict=True):
                update = p.grad
                if p.ndim > 1:
                    update = p.grad + 0.01 * p
                    update = update * 0.02 * p.norm() / (p.grad.norm() + 0.01 * p.norm())
                v.mul_(0.9).add_(update)
                p.sub_(2.0 * v)
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_lars_leaves_a_layer_of_zeros_a_ratio_of_one():
    layer = nn.Linear(3, 2, bias=False)
    nn.init.zeros_(layer.weight)
    optimizer = build_optimizer(
        "lars", layer, lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.0, decay_norms=True, trust=0.001
    )
    layer.weight.grad = torch.ones(2, 3)
    optimizer.step()
    assert torch.equal(layer.weight, -torch.ones(2, 3))


def test_lars_leaves_a_layer_without_a_gradient_a_ratio_of_one():
    """Its decay alone moves it, at the full rate."""
    layer = nn.Linear(3, 2, bias=False)
    nn.init.ones_(layer.weight)
    optimizer = build_optimizer(
        "lars", layer, lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.25, decay_norms=True, trust=0.001
    )
    layer.weight.grad = torch.zeros(2, 3)
    optimizer.step()
    assert torch.equal(layer.weight, torch.full((2, 3), 0.75))


def test_clipping_measures_before_it_clips():
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(4))]
    for p in parameters:
        p.grad = torch.full_like(p, 2.0)
    norm = clip_and_measure(parameters, 1.0)
    assert float(norm) == pytest.approx(math.sqrt(28))
    assert float(torch.cat([p.grad for p in parameters]).norm()) == pytest.approx(1.0, rel=1e-4)
    assert float(clip_and_measure(parameters, None)) == pytest.approx(1.0, rel=1e-4)
