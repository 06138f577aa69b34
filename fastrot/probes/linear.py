"""Linear classifiers on stored features: a grid of rates and decays trained at once. Not the protocol's heads.

The protocol trains on augmented images (`fastrot linear --checkpoint`); here every epoch sees the same
features, so accuracies are comparable among themselves alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fastrot.data.order import FullOrder
from fastrot.errors import UserError
from fastrot.probes.progress import Track, silent

RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
DECAYS = (0.0, 1e-4, 1e-2)
EPOCHS = 20
BATCH = 256
HELD_OUT = 10  # one training row in ten chooses rate and decay
_MOMENTUM = 0.9
_DROPS = (1 / 3, 2 / 3)  # of the epochs, a tenth of the rate from there on: the protocol's 30 and 60 of 90
_EPS = 1e-5


@dataclass(frozen=True)
class LinearResult:
    """Accuracies in percent.

    top1, top5      on the test rows, of the rate and decay that the held-out training rows chose.
    rate, decay     those.
    held_out, test  float64 [rates, decays]: top-1 of the whole grid.
    right           bool [n]: the test rows that the chosen classifier has right.
    """

    top1: float
    top5: float
    rate: float
    decay: float
    held_out: NDArray[np.float64]
    test: NDArray[np.float64]
    right: NDArray[np.bool_]


def linear(
    train_x: NDArray[np.generic],
    train_y: NDArray[np.integer],
    test_x: NDArray[np.generic],
    test_y: NDArray[np.integer],
    rates: Sequence[float] = RATES,
    decays: Sequence[float] = DECAYS,
    epochs: int = EPOCHS,
    seed: int = 0,
    device: torch.device | str = "cpu",
    track: Track = silent,
) -> LinearResult:
    """Softmax regression by SGD (momentum 0.9, Nesterov) for every rate and decay in the same products.

    train_x, test_x  [n, D] of a real dtype, mapped or not; dimensions are standardised by the training rows.
    train_y, test_y  int64 [n], 0 .. classes - 1.
    Rows, batches and the held-out tenth are drawn from `seed`. Raises UserError for rows without a label.
    """
    if epochs < 1:
        raise UserError(f"--epochs {epochs}: must be 1 or more")
    train_y, test_y = _known(train_y), _known(test_y)
    classes = int(max(train_y.max(), test_y.max())) + 1
    mixed = FullOrder(len(train_y), seed).rows(np.arange(len(train_y)), 0)
    held_out, fitted = np.sort(mixed[::HELD_OUT]), np.sort(np.delete(mixed, np.s_[::HELD_OUT]))
    mean, scale = _moments(train_x, fitted, device)

    def batch(x: NDArray[np.generic], rows: NDArray[np.int64]) -> Tensor:
        return (torch.from_numpy(np.asarray(x[rows], np.float32)).to(device) - mean) * scale

    y = torch.from_numpy(train_y).to(device)
    rate = torch.tensor(rates, device=device).repeat_interleave(len(decays))
    decay = torch.tensor(decays, device=device).repeat(len(rates))
    heads = _Heads(train_x.shape[1], classes, rate, decay, device)
    order = FullOrder(len(fitted), seed)
    for epoch in track(range(epochs), epochs, "epochs of the whole grid"):
        shuffled = fitted[order.rows(np.arange(len(fitted)), epoch + 1)]
        factor = 0.1 ** sum(epoch >= drop * epochs for drop in _DROPS)
        for at in range(0, len(shuffled), BATCH):
            rows = np.sort(shuffled[at : at + BATCH])  # a mapped array is read in order
            heads.step(batch(train_x, rows), y[torch.from_numpy(rows).to(device)], factor)

    def judged(
        x: NDArray[np.generic], labels: NDArray[np.integer], rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
        """top-1 and top-5 of every head, float64 [rates, decays], and what is right, bool [rows, rates, decays]."""
        sums, firsts = torch.zeros(2, len(rate), dtype=torch.float64), []
        for at in range(0, len(rows), BATCH):
            part = rows[at : at + BATCH]
            target = torch.from_numpy(labels[part]).to(device)[:, None, None]
            best = heads.logits(batch(x, part)).topk(min(5, classes), dim=2).indices
            hits = best == target
            right = hits.double().cumsum(2).sum(0).cpu()
            sums += torch.stack([right[:, 0], right[:, -1]])
            firsts.append(hits[..., 0].cpu())
        top1, top5 = (100 * sums / len(rows)).reshape(2, len(rates), len(decays)).numpy()
        return top1, top5, torch.cat(firsts).reshape(-1, len(rates), len(decays)).numpy()

    chosen = judged(train_x, train_y, held_out)[0]
    top1, top5, right = judged(test_x, test_y, np.arange(len(test_y)))
    best = divmod(int(np.argmax(chosen)), len(decays))
    return LinearResult(top1[best], top5[best], rates[best[0]], decays[best[1]], chosen, top1, right[:, *best])


def _known(labels: NDArray[np.integer]) -> NDArray[np.int64]:
    """The labels in memory: torch takes no mapped array. Raises UserError where one is missing."""
    if np.min(labels) < 0:
        raise UserError(f"{int((np.asarray(labels) < 0).sum())} rows have no label; a classifier needs them all")
    return np.array(labels, np.int64)


class _Heads:
    """P linear classifiers side by side: weights [D, P * K], one product for all."""

    def __init__(self, width: int, classes: int, rate: Tensor, decay: Tensor, device: torch.device | str):
        self._classes = classes
        self._rate, self._decay = (v.repeat_interleave(classes) for v in (rate, decay))
        self.weight = torch.zeros(width, len(rate) * classes, device=device)  # convex: any start will do
        self.bias = torch.zeros(len(rate) * classes, device=device)
        self._momenta = torch.zeros_like(self.weight), torch.zeros_like(self.bias)

    def logits(self, x: Tensor) -> Tensor:
        """[n, D] -> [n, P, K]."""
        return torch.addmm(self.bias, x, self.weight).view(len(x), -1, self._classes)

    def step(self, x: Tensor, y: Tensor, factor: float) -> None:
        """One step on a batch, at `factor` of each head's rate."""
        slope = self.logits(x).softmax(2)
        slope -= F.one_hot(y, self._classes)[:, None]
        slope = slope.reshape(len(x), -1) / len(x)
        for value, momentum, gradient in zip(
            (self.weight, self.bias), self._momenta, (x.T @ slope, slope.sum(0)), strict=True
        ):
            gradient = gradient.addcmul_(self._decay, value)
            momentum.mul_(_MOMENTUM).add_(gradient)
            value.sub_(factor * self._rate * gradient.add_(momentum, alpha=_MOMENTUM))


def _moments(x: NDArray[np.generic], rows: NDArray[np.int64], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation [D] over rows, fp32, summed in float64."""
    total = torch.zeros(2, x.shape[1], dtype=torch.float64, device=device)
    for at in range(0, len(rows), 1024):
        part = torch.from_numpy(np.asarray(x[rows[at : at + 1024]], np.float64)).to(device)
        total += torch.stack([part.sum(0), part.square().sum(0)])
    mean, square = total / len(rows)
    return mean.float(), (square - mean.square()).clamp_(min=0).add_(_EPS).rsqrt_().float()
