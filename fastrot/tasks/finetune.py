"""Fine-tuning: a pretrained backbone and a last layer learn classes together, on images as the plan crops them."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastrot.data.loader import MicroBatch
from fastrot.engine.optimizers import HEAD
from fastrot.models.resnet import build_model
from fastrot.tasks import Network, Task
from fastrot_kernels import rotate_views


class FinetuneTask(Task):
    """What is learnt: images and labels -> cross-entropy over the classes.

    backbone   a ResNet without its last layer, whose weights are where the network begins.
    mean, std  of the channels on the 0..255 scale.  dtype: of the images; what the first convolution reads.
    Source     protocol "Semi-supervised".
    """

    title = "fine-tuning"
    metrics = ("loss", "count", "right", "right_of_5")

    def __init__(
        self,
        backbone: nn.Module,
        classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.device = device
        self._backbone, self._classes, self._dtype = backbone, classes, dtype
        self._mean = torch.tensor(mean, dtype=torch.float32, device=device)
        self._std = torch.tensor(std, dtype=torch.float32, device=device)
        self.figures = {"accuracy": f"held-out accuracy (chance {1 / classes:.1%})", "top5": "held-out top-5"}

    def build_model(self, arch: str, seed: int) -> nn.Module:
        """The backbone's weights under a last layer N(0, 0.01^2); all of it learns, batch norms in train mode."""
        model: nn.Module = build_model(arch, self._classes, seed)
        head = {name: value for name, value in model.state_dict().items() if name.startswith(HEAD)}
        model.load_state_dict(self._backbone.state_dict() | head)
        return model

    def views(self, batch: MicroBatch) -> Tensor:
        """Flipped, normalised images, [n, 3, S, S], never turned."""
        upright = torch.zeros_like(batch.turns[:, :1])
        return rotate_views(batch.pixels, batch.flips, upright, self._mean, self._std, self._dtype)

    def loss(self, module: Network, views: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """(sum of cross-entropies over the images, float64 [len(metrics)] sums on the device)."""
        target = torch.from_numpy(batch.labels).to(self.device, non_blocking=True)
        logits: Tensor = module(views).float()
        loss = F.cross_entropy(logits, target, reduction="sum")
        hits = logits.topk(min(5, self._classes)).indices == target[:, None]
        sums = loss.detach(), loss.new_full((), len(target)), hits[:, 0].sum(), hits.sum()
        return loss, torch.stack([value.double() for value in sums])

    @staticmethod
    def summary(sums: Tensor) -> dict[str, float]:
        """Mean loss, top-1 (`accuracy`) and top-5 from summed metrics."""
        loss, count, right, right_of_5 = sums.tolist()
        return {"loss": loss / count, "accuracy": right / count, "top5": right_of_5 / count}

    @torch.no_grad()
    def evaluate(self, module: Network, batches: Iterable[MicroBatch]) -> Tensor:
        """Summed metrics over this rank's held-out batches; the caller puts the network in eval mode."""
        total = self._mean.new_zeros(len(self.metrics), dtype=torch.float64)
        for batch in (host.to(self.device) for host in batches):
            total += self.loss(module, self.views(batch), batch)[1]
        return total
