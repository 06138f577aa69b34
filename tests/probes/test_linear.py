"""The grid of linear classifiers against torch's own SGD, one head at a time."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fastrot.data.order import FullOrder
from fastrot.errors import UserError
from fastrot.probes.linear import BATCH, DECAYS, EPOCHS, HELD_OUT, RATES, _Heads, linear


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


def test_the_grid_is_a_plain_loop_of_torchs_over_rates_and_decays(monkeypatch):
    """Rows, batches and drops by the stated rule; each head alone, on torch's modules and SGD."""
    classes, epochs, rates, decays = 7, 6, (0.01, 0.3), (0.0, 0.05)
    x, y = clusters(610, classes, spread=2)
    test_x, test_y = clusters(150, classes, spread=2, seed=1)
    fed, step = [], _Heads.step
    monkeypatch.setattr(_Heads, "step", lambda heads, *given: (fed.append(given), step(heads, *given)))
    got = linear(x, y, test_x, test_y, rates, decays, epochs, seed=3)

    order = FullOrder(610, 3).rows(np.arange(610), 0)
    kept = np.sort(order[::10])
    rows = np.sort(np.setdiff1d(np.arange(610), kept))
    mean = torch.from_numpy(x[rows]).double().mean(0)
    scale = (torch.from_numpy(x[rows]).double().var(0, unbiased=False) + 1e-5).sqrt()

    def scaled(values):
        return ((torch.from_numpy(values).double() - mean) / scale).float()

    def percent(layer, values, labels, best):
        top = layer(scaled(values)).topk(best, 1).indices
        return 100 * float((top == torch.from_numpy(labels)[:, None]).any(1).double().mean())

    held_out, test, top5 = (np.empty((2, 2)) for _ in range(3))
    for i, rate in enumerate(rates):
        for j, decay in enumerate(decays):
            layer = torch.nn.Linear(12, classes)
            torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
            sgd = torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=decay)
            for epoch in range(epochs):
                sgd.param_groups[0]["lr"] = rate * (1, 1, 0.1, 0.1, 0.01, 0.01)[epoch]
                mixed = rows[FullOrder(len(rows), 3).rows(np.arange(len(rows)), epoch + 1)]
                for at in range(0, len(rows), 256):
                    batch = np.sort(mixed[at : at + 256])
                    if (i, j) == (0, 0):
                        given_x, given_y, factor = fed.pop(0)
                        torch.testing.assert_close(given_x, scaled(x[batch]), rtol=1e-5, atol=1e-5)
                        assert given_y.tolist() == y[batch].tolist()
                        assert factor == pytest.approx((1, 1, 0.1, 0.1, 0.01, 0.01)[epoch])
                    sgd.zero_grad()
                    F.cross_entropy(layer(scaled(x[batch])), torch.from_numpy(y[batch])).backward()
                    sgd.step()
            held_out[i, j], test[i, j] = percent(layer, x[kept], y[kept], 1), percent(layer, test_x, test_y, 1)
            top5[i, j] = percent(layer, test_x, test_y, 5)
    one_row = 100 / 61 + 1e-9  # a row at the border of two classes may fall to either side
    np.testing.assert_allclose(got.held_out, held_out, rtol=0, atol=one_row)
    np.testing.assert_allclose(got.test, test, rtol=0, atol=100 / 150 + 1e-9)
    at = np.unravel_index(held_out.argmax(), held_out.shape)
    assert (got.rate, got.decay) == (rates[at[0]], decays[at[1]])
    assert got.top5 == pytest.approx(top5[at], abs=100 / 150 + 1e-9)
    assert not fed and got.top5 > got.top1 + 5


def test_the_grids_numbers():
    assert RATES == (0.001, 0.003, 0.01, 0.03, 0.1, 0.3) and DECAYS == (0.0, 1e-4, 1e-2)
    assert (EPOCHS, BATCH, HELD_OUT) == (20, 256, 10)


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
