"""The batched solver against LIBLINEAR, and VOC07's protocol against scikit-learn's pieces."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.svm import LinearSVC

from fastrot.errors import Fault
from fastrot.probes import factors, solver, svm
from fastrot.probes.factors import Factors
from fastrot.probes.kernel import Features, Gram, gram, kernel_of
from fastrot.probes.precision import area_ap
from fastrot.probes.ridge import ridges
from fastrot.probes.solver import beginning, lengthened, solve
from fastrot.probes.svm import COSTS, decide, normalised, path, stratified_folds, voc_svm

WIDE, TALL = (60, 150), (300, 20)  # fewer rows than features, and more


def problem(rows: int, features: int, classes: int = 3, seed: int = 0):
    """Unit rows of correlated, half-empty features, and ±1 labels that they say something about."""
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((rows, 8))
    x = np.maximum(hidden @ rng.standard_normal((8, features)) + rng.standard_normal((rows, features)), 0)
    logits = hidden @ rng.standard_normal((8, classes)) + rng.standard_normal((rows, classes))
    y = np.where(logits > np.quantile(logits, 0.7, axis=0), 1, -1)
    return normalised(x), y


def linear_svc(x, y, cost, sample_weight=None) -> LinearSVC:
    model = LinearSVC(
        C=cost,
        loss="squared_hinge",
        intercept_scaling=1.0,
        class_weight={1: 2, -1: 1},
        tol=1e-9,
        max_iter=10**6,
        random_state=0,
    )
    return model.fit(x, y, sample_weight)


def objective(w, b, x, y, bounds) -> float:
    shortfall = np.maximum(0, 1 - y * (x @ w + b))
    return 0.5 * (w @ w + b * b) + 0.5 * bounds @ shortfall**2


def bounds_of(y, cost, weights=1.0):
    return 2 * cost * np.where(y == 1, 2.0, 1.0) * weights


def as_problem(a) -> torch.Tensor:
    return torch.as_tensor(np.ascontiguousarray(a), dtype=torch.float64)[None]


@pytest.mark.parametrize("shape", [WIDE, TALL])
@pytest.mark.parametrize("cost", [0.5**19, 0.5**4, 1.0, 100.0])
def test_decisions_are_those_of_linear_svc_run_to_convergence(shape, cost):
    x, y = problem(*shape)
    got = solve(kernel_of(x[None]), as_problem(y), as_problem(bounds_of(y, cost)))
    rows = np.random.default_rng(1).random((50, shape[1]))
    rows = normalised(rows)
    decisions = torch.cat(list(decide(x, got.beta[0], rows.split(7)))).numpy()
    for c in range(y.shape[1]):
        want = linear_svc(x.numpy(), y[:, c], cost)
        np.testing.assert_allclose(decisions[:, c], want.decision_function(rows.numpy()), atol=2e-4)
        np.testing.assert_allclose(got.scores[0, :, c], want.decision_function(x.numpy()), atol=2e-4)


@pytest.mark.parametrize("cost", [10.0, 100.0])
def test_the_objective_is_no_higher_than_liblinears(cost):
    x, y = problem(*WIDE)
    got = solve(kernel_of(x[None]), as_problem(y), as_problem(bounds_of(y, cost)))
    x = x.numpy()
    for c in range(y.shape[1]):
        want, bounds = linear_svc(x, y[:, c], cost), bounds_of(y[:, c], cost)
        beta = got.beta[0, :, c].numpy()
        ours = objective(x.T @ beta, beta.sum(), x, y[:, c], bounds)
        theirs = objective(want.coef_[0], want.intercept_[0], x, y[:, c], bounds)
        assert ours <= theirs + 1e-8


def test_the_stated_error_bounds_the_true_one():
    x, y = problem(40, 12, classes=1)
    bounds = bounds_of(y[:, 0], 10.0)
    rows = np.hstack([x.numpy(), np.ones((40, 1))])

    def value(w):
        return objective(w[:-1], w[-1], x.numpy(), y[:, 0], bounds)

    def gradient(w):
        return w - rows.T @ (bounds * y[:, 0] * np.maximum(0, 1 - y[:, 0] * (rows @ w)))

    best = minimize(value, np.zeros(13), jac=gradient, method="BFGS", options={"gtol": 1e-11, "maxiter": 10**5}).x
    for tolerance in (1.0, 1e-2, 1e-4):
        got = solve(kernel_of(x[None]), as_problem(y), as_problem(bounds[:, None]), tolerance=tolerance)
        far = np.linalg.norm(rows.T @ got.beta[0, :, 0].numpy() - best)
        assert far <= float(got.error) + 1e-9 and float(got.error) <= tolerance


def test_rows_of_weight_nought_are_left_out_and_scored_all_the_same():
    x, y = problem(*WIDE)
    inside = np.arange(len(y)) % 3 != 1
    weights = np.where(inside, 1.0, 0.0)[:, None]
    got = solve(kernel_of(x[None]), as_problem(y), as_problem(bounds_of(y, 1.0, weights)))
    assert not got.beta[0, ~inside].any()
    for c in range(y.shape[1]):
        want = linear_svc(x.numpy()[inside], y[inside, c], 1.0)
        np.testing.assert_allclose(got.scores[0, :, c], want.decision_function(x.numpy()), atol=2e-4)


def test_sample_weights_are_those_of_linear_svc():
    x, y = problem(*TALL)
    weights = np.random.default_rng(2).uniform(0.1, 3, len(y))
    got = solve(kernel_of(x[None]), as_problem(y), as_problem(bounds_of(y, 1.0, weights[:, None])))
    want = linear_svc(x.numpy(), y[:, 0], 1.0, weights)
    np.testing.assert_allclose(got.scores[0, :, 0], want.decision_function(x.numpy()), atol=2e-4)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 30), st.integers(1, 40), st.integers(0, 999), st.floats(-6, 2))
def test_gram_and_features_give_the_same_optimum_within_their_bounds(rows, features, seed, exponent):
    x, y = problem(rows, features, 2, seed)
    bounds = as_problem(bounds_of(y, 10.0**exponent))
    a, b = (solve(kernel, as_problem(y), bounds) for kernel in (Gram(gram(x[None])), Features(x[None])))
    assert float((a.scores - b.scores).abs().max()) <= 2**0.5 * float((a.error + b.error).max()) + 1e-9


def test_a_path_of_costs_gives_what_each_cost_gives_alone():
    x, y = problem(*WIDE)
    labels, weights = as_problem(y), as_problem(bounds_of(y, 0.5))
    for index, solution in path(kernel_of(x[None]), labels, weights, COSTS):
        alone = solve(kernel_of(x[None]), labels, 2 * COSTS[index] * weights)
        np.testing.assert_allclose(solution.scores, alone.scores, atol=3e-4)


def test_groups_of_rows_are_solved_as_if_alone():
    parts = [problem(50, 80, seed=s) for s in (1, 2)]
    x, y = torch.stack([p[0] for p in parts]), np.stack([p[1] for p in parts])
    both = solve(kernel_of(x), torch.from_numpy(y).double(), torch.from_numpy(bounds_of(y, 1.0)))
    for group, (rows, labels) in enumerate(parts):
        alone = solve(kernel_of(rows[None]), as_problem(labels), as_problem(bounds_of(labels, 1.0)))
        np.testing.assert_allclose(both.scores[group], alone.scores[0], atol=3e-4)


def factor(when: str):
    """Another answer to when a new factor pays: never, always, or once, to be kept for all later steps."""

    def tired(self, curve, wanted, columns):
        due = torch.full_like(wanted, when != "never")
        return due & ~(self.curve[..., columns] > 0).any(1) if when == "once" else due

    return tired


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 30), st.integers(0, 999), st.floats(-6, 2), st.booleans())
@example(22, 1, 385, 0.0, True)  # a factor of some rows of a singular K that rounding has spoilt
def test_factors_new_or_old_and_conjugate_gradients_alone_reach_the_same_optimum(rows, features, seed, exponent, twins):
    rng = np.random.default_rng(seed)
    x = normalised(rng.standard_normal((rows, features)))
    x = torch.cat([x, x]) if twins else x  # K is singular
    y = torch.from_numpy(rng.choice([-1.0, 1.0], (1, len(x), 3)))
    bounds = torch.from_numpy(10.0**exponent * rng.integers(0, 3, (1, len(x), 3)))  # some rows are left out
    kernel, results = Gram(gram(x[None])), []
    for when in ("never", "always", "once", "of some rows"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Factors, "tired", factor(when))
            if when == "of some rows":
                patch.setattr(factors, "_SOME", 4)
                patch.setattr(factors, "_FEW", 0)
            results.append(solve(kernel, y, bounds))
    a = results[0]
    for b in results[1:]:
        assert float((a.scores - b.scores).abs().max()) <= 2**0.5 * float((a.error + b.error).max()) + 1e-9


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 60), st.integers(0, 999), st.lists(st.floats(-7, 1), min_size=1, max_size=5))
@example(6, 1, 261, [0.0])  # labels that cancel out: float32 sees no gradient to follow
def test_ridges_of_all_costs_are_those_of_a_dense_solver(rows, features, seed, exponents):
    rng = np.random.default_rng(seed)
    x = normalised(rng.standard_normal((2 * rows, features))).view(2, rows, features)
    labels = torch.from_numpy(rng.choice([-1.0, 1.0], (2, rows, 3)))
    weights = torch.from_numpy(rng.integers(0, 3, (2, rows, 3)).astype(float))  # some rows are left out
    costs, k = 10.0 ** torch.tensor(exponents, dtype=torch.float64), gram(x)

    def gradient(residual):
        return (residual * (k @ residual)).sum(1).clamp(min=0).sqrt()

    for kernel in (Gram(k), Features(x)):
        for cost, got in zip(costs, ridges(kernel, labels, weights, costs, 1e-4), strict=True):
            curve = 2 * cost * weights
            system = torch.eye(rows, dtype=torch.float64) + curve.mT[..., None] * k[:, None]  # [2, 3, rows, rows]
            want = torch.linalg.solve(system, (curve * labels).mT[..., None])[..., 0].mT
            rounding = (1e-5 if kernel.dense else 1e-12) * curve.norm(dim=1)  # float32's or float64's
            start, left = gradient(curve * labels), gradient(got - want)
            # the error of a float32 inner product
            unseen = (2**-24 * (curve * (k.abs() @ curve)).sum(1)).sqrt() * kernel.dense
            assert ((left <= 1e-3 * start + rounding) | ((start <= unseen) & (left <= start + rounding))).all()


@pytest.mark.parametrize("dtype, far", [(torch.float64, 1e-8), (torch.float32, 1e-3)])
def test_a_newton_step_is_the_same_by_a_factor_as_by_conjugate_gradients(dtype, far):
    x, y = problem(*WIDE)
    kernel, rng = Gram(gram(x[None])), np.random.default_rng(3)
    curve = as_problem(np.where(rng.random(y.shape) < 0.5, bounds_of(y, 10.0), 0))
    residual = as_problem(rng.standard_normal(y.shape))
    pull = kernel.product(residual)
    scale = (residual * pull).sum(1, keepdim=True).sqrt()
    names = torch.arange(y.shape[1])
    fresh, stale = (Factors(*curve.shape, curve.device) for _ in range(2))
    fresh.renew(kernel, dtype, curve, torch.ones(1, y.shape[1], dtype=torch.bool), names)
    other = torch.where(torch.rand(curve.shape, generator=torch.Generator().manual_seed(0)) < 0.1, 1.0, 0.1 * curve)
    stale.renew(kernel, dtype, other, torch.ones(1, y.shape[1], dtype=torch.bool), names)
    counted, results, counts = mock.Mock(wraps=kernel), [], []
    for held in (fresh, stale, None):
        parts = curve, residual, pull, 1e-10 * scale, scale
        results.append(solver._conjugate_gradients(counted, dtype, *parts, held, names))
        counts.append(counted.product.call_count)
        counted.reset_mock()
    if dtype == torch.float64:
        one, few, many = counts
        assert one <= 4 and few / 2 < many  # two products a round, or one
    want = torch.linalg.solve(torch.eye(len(y)) + curve[0].T[:, :, None] * kernel.matrix, residual[0].T[..., None])[
        ..., 0
    ].T[None]
    for got in results:
        assert float((got - want).norm() / want.norm()) <= far


@pytest.mark.parametrize("rows, seed", [(3, 429), (34, 0), (1, 0)])
@pytest.mark.parametrize("when", ["never", "always", "once"])
def test_problems_whose_weights_cancel_are_solved(rows, seed, when, monkeypatch):
    monkeypatch.setattr(Factors, "tired", factor(when))
    x = normalised(np.random.default_rng(seed).standard_normal((rows, 1)))
    x, y = torch.cat([x, x]), torch.ones(1, 2 * rows, 1, dtype=torch.float64)
    y[:, rows:] = -1  # every row is also there with the other label: w = b = 0
    got = solve(Gram(gram(x[None])), y, torch.ones_like(y))
    assert float(got.scores.abs().max()) <= 1e-6


def test_new_factors_of_all_active_rows_leave_nothing_to_conjugate_gradients(monkeypatch):
    x, y = problem(*WIDE)
    kernel, bounds = kernel_of(x[None]), as_problem(bounds_of(y, 100.0))
    want = solve(kernel, as_problem(y), bounds)
    monkeypatch.setattr(Factors, "tired", factor("always"))
    monkeypatch.delattr(solver, "_conjugate_gradients")
    got = solve(kernel, as_problem(y), bounds)
    assert float((got.scores - want.scores).abs().max()) <= 2**0.5 * float((got.error + want.error).max()) + 1e-9


def test_a_path_gets_factors_at_its_end_and_keeps_them():
    x, y = problem(*WIDE)
    labels, weights = as_problem(y), as_problem(bounds_of(y, 0.5))
    solutions = path(kernel_of(x[None]), labels, weights, COSTS)
    held = [bool((solution.factors.curve > 0).any(1).all()) for _, solution in solutions]
    assert not any(held[:10]) and held[-1] and held == sorted(held)


def test_a_block_that_is_singular_to_float32_is_factored_in_float64():
    x = normalised(np.random.default_rng(4).standard_normal((20, 5)))
    kernel = Gram(gram(torch.cat([x, x])[None]))
    curve, residual = torch.full((1, 40, 1), 1e10, dtype=torch.float64), torch.ones(1, 40, 1, dtype=torch.float64)
    factors, which, names = (
        Factors(1, 40, 1, x.device),
        torch.ones(1, 1, dtype=torch.bool),
        torch.zeros(1, dtype=torch.int64),
    )
    factors.renew(kernel, torch.float32, curve, which, names)
    got = factors.solved(residual, kernel.product(residual), which, names)
    left = residual - got - curve * kernel.product(got)
    assert float(kernel.product(left).norm()) <= 1e-3 * float(kernel.product(residual).norm())


@pytest.mark.parametrize("rows", [(), (3,), (0, 7, 8, 59)])
def test_a_kernel_among_some_rows_is_that_of_those_rows(rows):
    x = problem(*WIDE)[0][None]
    rows = torch.tensor(rows, dtype=torch.int64)
    v = torch.ones(1, len(rows), 2, dtype=torch.float64)
    for kernel in (Gram(gram(x)), Features(x)):
        torch.testing.assert_close(kernel.among(rows).product(v), gram(x[:, rows]) @ v)


@settings(max_examples=20, deadline=None)
@given(st.floats(-3, 3), st.integers(0, 99))
def test_a_guess_at_the_solution_leads_to_the_same_optimum(exponent, seed):
    x, y = problem(*WIDE)
    kernel, bounds = kernel_of(x[None]), as_problem(bounds_of(y, 1.0))
    guess = as_problem(10.0**exponent * np.random.default_rng(seed).standard_normal(y.shape))
    got, want = solve(kernel, as_problem(y), bounds, beginning(kernel, guess)), solve(kernel, as_problem(y), bounds)
    assert float((got.scores - want.scores).abs().max()) <= 2**0.5 * float((got.error + want.error).max()) + 1e-9


def test_a_solution_drawn_out_for_a_higher_cost_is_longer_and_its_objective_there_lower():
    x, y = problem(*WIDE)
    kernel, low, high = kernel_of(x[None]), as_problem(bounds_of(y, 1.0)), as_problem(bounds_of(y, 10.0))
    start = solve(kernel, as_problem(y), low)
    drawn = lengthened(start, as_problem(y), high)

    def objective(s):
        short = (1 - as_problem(y) * s.scores).clamp(min=0)
        return 0.5 * (s.beta * s.scores).sum(1) + 0.5 * (high * short**2).sum(1)

    assert (drawn.beta.norm(dim=1) > start.beta.norm(dim=1)).all() and (objective(drawn) < objective(start)).all()
    torch.testing.assert_close(kernel.product(drawn.beta), drawn.scores)


def test_a_factor_is_renewed_for_many_changed_rows_and_not_for_none():
    rows, columns, wanted = 2000, torch.arange(3), torch.tensor([[True, True, False]])
    curve = torch.where(torch.arange(rows)[:, None] < 600, 400.0, torch.zeros(1, rows, 3, dtype=torch.float64))
    factors = Factors(1, rows, 3, curve.device)
    factors.curve = curve.clone()
    assert not factors.tired(curve, wanted, columns).any()
    now = curve.roll(100, 1)
    assert factors.tired(now, wanted, columns).tolist() == [[True, True, False]]
    assert not Factors(1, rows, 3, curve.device).tired(1e-4 * curve, wanted, columns).any()  # a round or two, no more


def test_a_solver_that_does_not_get_there_says_so(monkeypatch):
    monkeypatch.setattr(solver, "_NEWTON_STEPS", 1)
    x, y = problem(*WIDE)
    with pytest.raises(Fault, match="3 problems did not converge in 1 Newton steps"):
        solve(kernel_of(x[None]), as_problem(y), as_problem(bounds_of(y, 100.0)))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.booleans(), min_size=6, max_size=60).filter(lambda y: 3 <= sum(y) <= len(y) - 3))
def test_folds_are_those_of_stratified_k_fold(y):
    y = np.array(y)
    got = stratified_folds(y, 3)
    for fold, (_, out) in enumerate(StratifiedKFold(3).split(y, y)):
        np.testing.assert_array_equal(np.flatnonzero(got == fold), out)


def test_voc_svm_is_the_scripts_way_with_scikit_learn():
    """Costs up to 1: LinearSVC of the reference is run to convergence, class by class and cost by cost."""
    costs = (1.0, 0.5**4, 0.5**8)
    x, y = problem(150, 200, classes=4)
    x = x.numpy() * np.linspace(1, 30, len(x))[:, None]  # rows of any length
    y = np.where(y == 1, 1, 0)
    y[::17] = -1
    train, test = slice(0, 100), slice(100, 150)
    got = voc_svm(x[train], y[train], x[test], y[test], costs)

    def unit(rows):
        return rows / (np.linalg.norm(rows, axis=1) + 1e-5)[:, None]

    for c in range(4):
        labels = np.where(y[train, c] == 1, 1, -1)
        kind = dict(class_weight={1: 2, -1: 1}, tol=1e-8, max_iter=10**6, random_state=0)
        means = [
            cross_val_score(LinearSVC(C=cost, **kind), unit(x[train]), labels, cv=3, scoring="average_precision").mean()
            for cost in costs
        ]
        np.testing.assert_allclose(got.cross_validation[c], means, atol=1e-9)
        assert got.costs[c] == costs[int(np.argmax(means))]
        model = LinearSVC(C=got.costs[c], **kind).fit(unit(x[train]), labels)
        kept = y[test, c] != -1
        want = area_ap(y[test, c][kept] > 0, model.decision_function(unit(x[test]))[kept])
        np.testing.assert_allclose(got.per_class[c], want, atol=1e-9)
    np.testing.assert_allclose(got.average_precision, 100 * got.per_class.mean())


def test_equal_costs_in_cross_validation_give_the_first_listed():
    x, y = problem(60, 30, classes=1)
    x, y = x.numpy(), np.where(y == 1, 1, 0)
    assert voc_svm(x, y, x, y, (0.5**19, 0.5**18)).costs == 0.5**19
    assert voc_svm(x, y, x, y, (0.5**18, 0.5**19)).costs == 0.5**18


def test_the_protocols_numbers():
    """MMSelfSup 0.11's lists to the letter: their order decides ties, and a default that moved would move every table."""
    assert COSTS == (
        1.0, 10.0, 100.0, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625, 0.001953125, 0.0009765625, 0.00048828125,
        0.000244140625, 0.0001220703125, 6.103515625e-05, 3.0517578125e-05, 1.52587890625e-05, 7.62939453125e-06,
        3.814697265625e-06, 1.9073486328125e-06,
    )  # fmt: skip
    x, y = problem(30, 8, classes=2)
    x = x.numpy()
    found = voc_svm(x, np.where(y == 1, 1, 0), x, np.where(y == 1, 1, 0))
    assert found.cross_validation.shape == (2, 19) and found.fits == 2 * (19 * 3 + 1)


def test_a_row_is_divided_by_its_norm_and_a_hundred_thousandth():
    got = normalised([[3e-5, 4e-5], [0.0, 0.0], [3.0, 4.0]]).tolist()
    assert got[0] == pytest.approx([0.5, 2 / 3], rel=1e-12)
    assert got[1] == [0, 0]
    assert got[2] == pytest.approx([0.6 * 5 / 5.00001, 0.8 * 5 / 5.00001], rel=1e-12)


def test_the_cost_is_the_one_of_the_best_mean_over_folds(monkeypatch):
    """By hand: of three folds the first cost has the best one, the second the best median, the third the best mean."""
    table = iter([0.9, 0.1, 0.1, 0.4, 0.4, 0.3, 0.3, 0.3, 0.6])  # cost by cost, its three folds
    monkeypatch.setattr(svm, "step_ap", lambda positive, scores: next(table))
    x, y = problem(30, 8, classes=1)
    x, y = x.numpy(), np.where(y == 1, 1, 0)
    found = voc_svm(x, y, x, y, (1.0, 0.5**4, 0.5**8))
    assert found.costs == 0.5**8
    np.testing.assert_allclose(found.cross_validation, [[1.1 / 3, 1.1 / 3, 0.4]])
