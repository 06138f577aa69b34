"""Rotation prediction: which quarter turn was made? Four views an image, four classes."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models import ResNet

from fastrot.data.loader import MicroBatch
from fastrot.models.resnet import TURNS, build_model
from fastrot.tasks import Network, Task
from fastrot_kernels import rotate_views


class RotationTask(Task):
    """What is learnt: batch -> loss and metrics.

    mean, std       of the channels on the 0..255 scale.
    dtype, channels of the views; what the first convolution reads: 3, and more that are zero.
    shuffle_labels  the control: learn labels shuffled among the views of a micro-step.
    Source          Gidaris et al., arXiv:1803.07728.
    """

    title = "rotation pretraining"
    # sums a step adds up, in this order; `count` and `right` are by true turn
    metrics = ("loss", *(f"count_{t}" for t in range(TURNS)), *(f"right_{t}" for t in range(TURNS)))

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        dtype: torch.dtype,
        device: torch.device,
        shuffle_labels: bool = False,
        channels: int = 3,
    ):
        self._mean = torch.tensor(mean, dtype=torch.float32, device=device)
        self._std = torch.tensor(std, dtype=torch.float32, device=device)
        self.device = device
        self.figures = {"accuracy": f"held-out rotation accuracy (chance {1 / TURNS:.0%})"}
        self._dtype, self._shuffle, self._channels = dtype, shuffle_labels, channels

    @staticmethod
    def build_model(arch: str, seed: int) -> ResNet:
        return build_model(arch, TURNS, seed)

    def views(self, batch: MicroBatch) -> Tensor:
        """The rotated, normalised views, [n * V, C', S, S], channels-last."""
        return rotate_views(batch.pixels, batch.flips, batch.turns, self._mean, self._std, self._dtype, self._channels)

    def loss(self, module: Network, views: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """(sum of cross-entropies over the views, float64 [len(metrics)] sums on the device)."""
        target = batch.turns.flatten().long()
        if self._shuffle:
            target = target[torch.randperm(len(target), device=target.device)]
        logits: Tensor = module(views).float()
        loss = F.cross_entropy(logits, target, reduction="sum")
        return loss, self._sums(loss, logits, target)

    @staticmethod
    def _sums(loss: Tensor, logits: Tensor, target: Tensor) -> Tensor:
        # not F.one_hot, which on a CPU asks for the largest target
        turns = (target[:, None] == torch.arange(TURNS, device=target.device)).double()
        right = (logits.argmax(1) == target).double()
        return torch.cat([loss.detach().double()[None], turns.sum(0), (turns * right[:, None]).sum(0)])

    @classmethod
    def summary(cls, sums: Tensor) -> dict[str, float]:
        """Mean loss and accuracies (overall and by turn, in degrees) from summed metrics."""
        values = sums.tolist()
        count, right = values[1 : 1 + TURNS], values[1 + TURNS :]
        views = sum(count)
        out = {"loss": values[0] / views, "accuracy": sum(right) / views}
        for turn in range(TURNS):
            if count[turn]:
                out[f"accuracy_{90 * turn}"] = right[turn] / count[turn]
        return out

    @torch.no_grad()
    def evaluate(self, module: Network, batches: Iterable[MicroBatch]) -> Tensor:
        """Summed metrics over this rank's held-out batches; the caller puts the model in eval mode."""
        total = self._mean.new_zeros(len(self.metrics), dtype=torch.float64)
        for batch in (host.to(self.device) for host in batches):
            target = batch.turns.flatten().long()
            logits: Tensor = module(self.views(batch)).float()
            total += self._sums(F.cross_entropy(logits, target, reduction="sum"), logits, target)
        return total
