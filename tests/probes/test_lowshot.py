"""Low-shot draws against golden vectors; the table against scikit-learn, fit by fit."""

import hashlib
import json

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC

from conftest import ROOT
from fastrot.data.randomness import philox
from fastrot.errors import UserError
from fastrot.probes import lowshot
from fastrot.probes.lowshot import draw, drawn_targets, low_shot, published_targets
from fastrot.probes.precision import area_ap
from fastrot.probes.svm import stratified_folds

COSTS = (1.0, 10.0, 0.5**4, 0.5**12)


@pytest.mark.parametrize("case", json.loads((ROOT / "tests/golden/stream.json").read_text())["draw"])
def test_draws_are_the_golden_ones(case):
    rows = range(int(case["rows"].removeprefix("range(").removesuffix(")")))
    assert draw(case["seed"], case["sample"], case["group"], rows, case["k"]).tolist() == case["drawn"]


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(5)
    hidden = rng.standard_normal((400, 6))
    x = np.maximum(hidden @ rng.standard_normal((6, 120)) + rng.standard_normal((400, 120)), 0)
    logits = hidden @ rng.standard_normal((6, 3)) + rng.standard_normal((400, 3))
    y = (logits > np.quantile(logits, (0.9, 0.95, 0.97), axis=0).diagonal()).astype(np.int8)
    y[::13] = -1
    return x[:300], y[:300], x[300:], y[300:]


def test_targets_hold_k_positives_and_nineteen_times_as_many_negatives_and_no_difficult_row(data):
    y = data[1]
    targets = drawn_targets(y, 2, 4, seed=7)
    assert ((targets == 1).sum(0) == 4).all() and ((targets == 0).sum(0) == 76).all()
    assert (y[targets == 1] == 1).all() and (y[targets == 0] == 0).all()
    assert not np.array_equal(targets, drawn_targets(y, 3, 4, seed=7))
    assert drawn_targets(y, 2, 96, seed=7) is None


def test_drawn_targets_as_numbers():
    """Rows of the smallest luck, positives of class c in group 2 c, negatives in 2 c + 1: by the golden generator."""
    y = np.zeros((150, 2), np.int8)
    y[::3, 0], y[1::4, 1], y[5::7] = 1, 1, -1
    got = drawn_targets(y, 3, 2, seed=11)
    for c in range(2):
        for value, group, count in ((1, 2 * c, 2), (0, 2 * c + 1, 38)):
            rows = np.flatnonzero(y[:, c] == value)
            words = philox(11, rows, 3, 6, group).tolist()
            lucky = sorted(zip(words, rows.tolist(), strict=True), key=lambda row: row[0][:2])[:count]
            assert np.flatnonzero(got[:, c] == value).tolist() == sorted(row for _, row in lucky)
    assert [np.flatnonzero(column == 1).tolist() for column in got.T] == [[42, 81], [53, 101]]
    assert hashlib.sha256(got.tobytes()).hexdigest()[:16] == "c5738e579fa90961"


def test_the_oracles_cost_is_the_best_mean_over_draws(data, monkeypatch):
    """By hand: the first cost wins one draw by far, the last all in all."""
    monkeypatch.setattr(
        lowshot,
        "_one_draw",
        lambda whole, cross, targets, *_: lowshot._Part(
            np.full((3, 4), [[0.9, 0.5, 0.4, 0.6], [0.1, 0.5, 0.4, 0.6]][targets]),
            np.zeros(3, int),
            0.0,
        ),
    )
    (found,), _ = low_shot(*data, lambda sample, k: sample, ks=(2,), samples=2, costs=COSTS)
    np.testing.assert_allclose(found.test, [[90, 50, 40, 60], [10, 50, 40, 60]])
    assert found.oracle_cost == COSTS[3]
    np.testing.assert_allclose(found.cross_validated, [90, 10])


def test_the_protocols_numbers():
    assert lowshot.KS == (1, 2, 4, 8, 16, 32, 64, 96) and lowshot.SAMPLES == 5


def test_the_table_is_that_of_linear_svc_fitted_one_by_one(data):
    x, y, test_x, test_y = data

    def targets(sample, k):
        return drawn_targets(y, sample, k, seed=7)

    got, left_out = low_shot(x, y, test_x, test_y, targets, ks=(1, 2, 5, 96), samples=2, costs=COSTS)
    assert left_out == [96] and [r.k for r in got] == [1, 2, 5]

    def unit(rows):
        return rows / (np.linalg.norm(rows, axis=1) + 1e-5)[:, None]

    def fitted(cost, rows, labels):
        return LinearSVC(C=cost, class_weight={1: 2, -1: 1}, tol=1e-9, max_iter=10**6, random_state=0).fit(rows, labels)

    for result in got:
        for sample in range(2):
            drawn = targets(sample, result.k)
            by_cost, honest = [], []
            for c in range(3):
                rows = np.flatnonzero(drawn[:, c] >= 0)
                labels, kept = np.where(drawn[rows, c] == 1, 1, -1), test_y[:, c] != -1
                aps = []
                for cost in COSTS:
                    decisions = fitted(cost, unit(x)[rows], labels).decision_function(unit(test_x))
                    aps.append(area_ap(test_y[kept, c] > 0, decisions[kept]))
                by_cost.append(aps)
                chosen = 0
                if result.k > 1:
                    folds = list(StratifiedKFold(min(3, result.k)).split(rows, labels))
                    means = [
                        np.mean(
                            [
                                average_precision_score(
                                    labels[out],
                                    fitted(cost, unit(x)[rows[into]], labels[into]).decision_function(
                                        unit(x)[rows[out]]
                                    ),
                                )
                                for into, out in folds
                            ]
                        )
                        for cost in COSTS
                    ]
                    chosen = int(np.argmax(means))
                honest.append(aps[chosen])
                assert result.chosen[sample, c] == COSTS[chosen]
            np.testing.assert_allclose(result.test[sample], 100 * np.mean(by_cost, axis=0), atol=1e-6)
            np.testing.assert_allclose(result.cross_validated[sample], 100 * np.mean(honest), atol=1e-6)
        assert result.oracle_cost == COSTS[int(result.test.mean(0).argmax())]


def test_small_blocks_of_classes_give_the_same_table(data, monkeypatch):
    x, y, test_x, test_y = data

    def table():
        return low_shot(
            x, y, test_x, test_y, lambda sample, k: drawn_targets(y, sample, k, seed=1), ks=(3,), samples=1, costs=COSTS
        )[0][0].test

    whole = table()
    monkeypatch.setattr(lowshot, "_BLOCK_BYTES", 1)
    np.testing.assert_allclose(table(), whole, atol=1e-6)


def test_threads_side_by_side_give_the_same_table_and_leave_torchs_own_as_they_were(data):
    before, tables = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results, _ = low_shot(
                *data, lambda sample, k: drawn_targets(data[1], sample, k, seed=1), ks=(2, 3), samples=3, costs=COSTS
            )
            assert torch.get_num_threads() == threads
            tables.append([result.test for result in results])
    finally:
        torch.set_num_threads(before)
    np.testing.assert_allclose(*tables, atol=1e-6)


def test_published_draws_are_read_without_pickle(tmp_path):
    targets = np.array([[1, -1], [0, 1], [-1, 0]], np.float64)
    np.save(tmp_path / "train_targets_sample3_k2.npy", targets)
    np.testing.assert_array_equal(published_targets(tmp_path, 2, 2, (3, 2)), targets)
    assert published_targets(tmp_path, 0, 2, (3, 2)) is None
    with pytest.raises(UserError, match="expected 5 x 2 of -1, 0 and 1"):
        published_targets(tmp_path, 2, 2, (5, 2))
    np.save(tmp_path / "train_targets_sample1_k2.npy", np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(UserError, match="not a plain numpy array"):
        published_targets(tmp_path, 0, 2, (3, 2))


def test_two_folds_hold_out_one_positive_each():
    positive = np.array([False, True, False, True, False, False])
    folds = stratified_folds(positive, 2)
    assert sorted(folds[positive]) == [0, 1]
