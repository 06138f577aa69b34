"""The grid of linear classifiers against torch's own SGD, one head at a time."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fastrot.errors import UserError
from fastrot.probes.linear import _Heads, linear


def clusters(n, classes=4, width=12, spread=1.0, seed=0):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(7).normal(size=(classes, width))
    y = rng.integers(0, classes, n)
    return (centres[y] + spread * rng.normal(size=(n, width))).astype(np.float32) * 5 + 3, y


def test_each_head_of_the_grid_steps_as_torchs_nesterov_sgd_does():
    rates, decays = torch.tensor([0.1, 0.1, 0.5]), torch.tensor([0.0, 0.01, 0.1])
    heads = _Heads(12, 4, rates, decays, "cpu")
    x, y = (torch.from_numpy(a) for a in clusters(64))
    x = (x - x.mean(0)) / x.std(0)
    got = []
    for step in range(5):
        heads.step(x[step::5], y[step::5], 0.5 if step > 2 else 1.0)
    got = heads.weight.view(12, 3, 4), heads.bias.view(3, 4)
    for head, (rate, decay) in enumerate(zip(rates, decays, strict=True)):
        layer = torch.nn.Linear(12, 4)
        torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
        sgd = torch.optim.SGD(
            layer.parameters(), lr=float(rate), momentum=0.9, nesterov=True, weight_decay=float(decay)
        )
        for step in range(5):
            sgd.param_groups[0]["lr"] = float(rate) * (0.5 if step > 2 else 1.0)
            sgd.zero_grad()
            F.cross_entropy(layer(x[step::5]), y[step::5]).backward()
            sgd.step()
        torch.testing.assert_close(got[0][:, head], layer.weight.detach().T)
        torch.testing.assert_close(got[1][head], layer.bias.detach())


def test_separable_classes_are_told_apart_and_noise_is_not():
    x, y = clusters(600, spread=0.2)
    test_x, test_y = clusters(200, spread=0.2, seed=1)
    found = linear(x, y, test_x, test_y, epochs=5)
    assert found.top1 > 99 and found.top5 == 100
    assert linear(x, np.random.default_rng(3).permutation(y), test_x, test_y, epochs=5).top1 < 60


def test_the_choice_never_sees_the_test_rows():
    x, y = clusters(400, spread=2)
    test_x, test_y = clusters(100, spread=2, seed=1)
    honest = linear(x, y, test_x, test_y, epochs=3)
    fooled = linear(x, y, test_x, (test_y + 1) % 4, epochs=3)
    assert (honest.rate, honest.decay) == (fooled.rate, fooled.decay)
    assert np.array_equal(honest.held_out, fooled.held_out)
    at = np.unravel_index(honest.held_out.argmax(), honest.held_out.shape)
    assert honest.top1 == honest.test[at]


def test_rows_without_a_label_are_refused():
    x, y = clusters(50)
    with pytest.raises(UserError, match="3 rows have no label"):
        linear(x, np.where(np.arange(50) < 3, -1, y), x, y)


def test_no_epoch_is_refused():
    x, y = clusters(50)
    with pytest.raises(UserError, match="--epochs 0"):
        linear(x, y, x, y, epochs=0)
