"""What a run learns. A task is one file here, and a job in `fastrot/runs` that builds it."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastrot.data.loader import MicroBatch

# a network as an engine calls it: views -> whatever the task's own network gives
Network = Callable[[Tensor], Any]


class Task(Protocol):
    """A network, and from a batch its loss and metrics. It knows no loop, no kind of engine, no ranks.

    title    of its runs.
    figures  held-out ones by their names in `summary` or a job's evaluation, and what a person reads; the first, within
             0..1, chooses the best checkpoint.
    metrics  names of what `loss` sums up, in that order.
    device   where views and sums lie.
    """

    title: str
    figures: dict[str, str]
    metrics: tuple[str, ...]
    device: torch.device

    def build_model(self, arch: str, seed: int) -> nn.Module:
        """The network, float32, on the CPU; what is drawn depends on the seed alone."""

    def views(self, batch: MicroBatch) -> Tensor:
        """What the network sees of a batch on the device: [views, C, S, S], flipped, normalised, channels-last."""

    def loss(self, module: Network, views: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """(the loss, summed over the views: the engine divides it, and metrics: float64 sums [len(metrics)]).

        No host sync: it may be captured in a CUDA graph, which then shows it no more of a batch than `turns`.
        """

    def summary(self, sums: Tensor) -> dict[str, float]:
        """Means of summed metrics for the log: `loss`, `accuracy` where the task has one, and others."""

    def evaluate(self, module: Network, batches: Iterable[MicroBatch]) -> Tensor:
        """Metrics summed over this rank's held-out batches, as evaluation shows them; the network is in eval mode."""
