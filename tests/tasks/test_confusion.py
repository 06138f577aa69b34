"""mIoU and accuracies against scikit-learn's, from the same arrays."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, jaccard_score

from fastrot.tasks.confusion import confusion, figures


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 9), st.integers(0, 2**31), st.floats(0, 1))
def test_figures_are_scikit_learns(classes, seed, noise):
    rng = np.random.default_rng(seed)
    true = rng.integers(0, classes, (3, 11, 7))
    true.reshape(-1)[:classes] = np.arange(classes)  # each is there once
    predicted = np.where(rng.random(true.shape) < noise, rng.integers(0, classes, true.shape), true)
    true[rng.random(true.shape) < 0.1] = 255
    matrix = sum(
        confusion(torch.from_numpy(p), torch.from_numpy(t), classes) for p, t in zip(predicted, true, strict=True)
    )
    seen = true != 255
    labels = np.unique(np.concatenate([true[seen], predicted[seen]]))
    assert np.array_equal(matrix, confusion_matrix(true[seen], predicted[seen], labels=range(classes)))
    got = figures(matrix)
    assert got.mean_iou == pytest.approx(jaccard_score(true[seen], predicted[seen], labels=labels, average="macro"))
    assert got.all_accuracy == pytest.approx(accuracy_score(true[seen], predicted[seen]))
    if set(np.unique(predicted[seen])) <= set(np.unique(true[seen])):
        assert got.mean_accuracy == pytest.approx(balanced_accuracy_score(true[seen], predicted[seen]))


def test_a_class_that_is_nowhere_does_not_count():
    true = torch.tensor([0, 0, 1, 1, 255])
    got = figures(confusion(torch.tensor([0, 1, 1, 1, 2]), true, 4))
    assert got.mean_iou == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert np.isnan(got.iou[2:]).all()
