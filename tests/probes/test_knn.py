"""k-NN against brute force and scikit-learn's classifier."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from fastrot.errors import UserError
from fastrot.probes import neighbours as module
from fastrot.probes.neighbours import knn, neighbours


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "_BANK_ROWS", 37)
    monkeypatch.setattr(module, "_QUERY_ROWS", 11)


def clusters(rows: int, seed: int, classes: int = 7, dim: int = 16):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).standard_normal((classes, dim))
    y = rng.integers(0, classes, rows)
    return (centres[y] + 1.5 * rng.standard_normal((rows, dim))).astype(np.float32), y


def unit(x):
    return x / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)


@pytest.mark.parametrize("bank_rows, k", [(20, 20), (37, 5), (38, 38), (200, 60)])
def test_neighbours_are_those_of_brute_force(bank_rows, k):
    bank, queries = clusters(bank_rows, 1)[0], clusters(25, 2)[0]
    cosines, rows = neighbours(bank, queries, k)
    want = unit(queries) @ unit(bank).T
    order = np.argsort(-want, axis=1)[:, :k]
    np.testing.assert_allclose(cosines, np.take_along_axis(want, order, 1), atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(want, rows.numpy(), 1), np.take_along_axis(want, order, 1), atol=1e-6)
    assert all(len(set(row)) == k for row in rows.tolist())


@pytest.mark.parametrize("k", [1, 10, 100])
def test_votes_are_those_of_scikit_learn_with_the_same_weights(k):
    (bank, bank_y), (queries, query_y) = clusters(300, 1), clusters(90, 2)

    def weights(distance):  # of unit vectors: squared distance = 2 - 2 cosine
        return np.exp((1 - distance**2 / 2) / 0.07)

    model = KNeighborsClassifier(k, weights=weights, algorithm="brute").fit(unit(bank), bank_y)
    shares = model.predict_proba(unit(queries))
    ranked = np.argsort(-shares, axis=1)
    top1, top5 = knn(bank, bank_y, queries, query_y, [k])[k]
    assert top1 == pytest.approx(100 * (ranked[:, 0] == query_y).mean())
    voted = np.take_along_axis(shares, query_y[:, None], 1)[:, 0] > 0
    assert top5 == pytest.approx(100 * ((ranked[:, :5] == query_y[:, None]).any(1) & voted).mean())


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 80), st.integers(1, 30), st.data())
def test_the_size_of_blocks_changes_nothing(bank_rows, query_rows, data):
    k = data.draw(st.integers(1, bank_rows))
    (bank, bank_y), (queries, query_y) = clusters(bank_rows, 3), clusters(query_rows, 4)
    with pytest.MonkeyPatch.context() as patch:
        got = []
        for bank_block, query_block in ((7, 3), (1000, 1000)):
            patch.setattr(module, "_BANK_ROWS", bank_block)
            patch.setattr(module, "_QUERY_ROWS", query_block)
            got.append(knn(bank, bank_y, queries, query_y, [k]))
    assert got[0] == got[1]


def test_memory_mapped_half_precision_is_read_as_it_lies(tmp_path):
    (bank, bank_y), (queries, query_y) = clusters(100, 1), clusters(40, 2)
    for name, x in (("bank", bank), ("queries", queries)):
        np.save(tmp_path / f"{name}.npy", x.astype(np.float16))
    mapped = [np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("bank", "queries")]
    halves = [x.astype(np.float16).astype(np.float32) for x in (bank, queries)]
    assert knn(mapped[0], bank_y, mapped[1], query_y, [5, 20]) == knn(halves[0], bank_y, halves[1], query_y, [5, 20])


def test_a_class_without_a_vote_is_never_right():
    bank, queries = np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32)[:1]
    assert knn(bank, [0, 1, 1], queries, [4], [2])[2] == (0.0, 0.0)


def test_rows_without_labels_and_banks_too_small_are_refused():
    x = np.eye(4, dtype=np.float32)
    with pytest.raises(UserError, match="1 of 4 rows of the bank have no label"):
        knn(x, [0, 1, -1, 0], x, [0, 1, 1, 0], [1])
    with pytest.raises(UserError, match="2 of 4 rows of the queries have no label"):
        knn(x, [0, 1, 1, 0], x, [0, -1, -1, 0], [1])
    with pytest.raises(UserError, match="k = 5 needs as many rows, the bank has 4"):
        knn(x, [0, 1, 1, 0], x, [0, 1, 1, 0], [1, 5])
