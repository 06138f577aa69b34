"""Linear heads on a frozen backbone: five at once, or one on the global average, images augmented online."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fastrot.data import augment
from fastrot.data.loader import MicroBatch
from fastrot.models.taps import AVERAGE, pooled_maps
from fastrot.tasks import Network, Task, colour
from fastrot_kernels import rotate_views


class Heads(nn.Module):
    """backbone [n, 3, H, W] -> a list of logits [n, classes], one a tap; only the heads learn.

    A head is pool, batch norm without weights, flatten, Linear N(0, 0.01^2); on `avg` it has no norm.
    The backbone stays in eval mode whatever mode is set. Source: protocol "Linear heads".
    """

    def __init__(self, backbone: nn.Module, taps: tuple[str, ...], pool: str, side: int, classes: int, seed: int):
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self._taps, self._pool = taps, pool
        with torch.inference_mode():
            shapes = {
                tap: x.shape[1:] for tap, x in pooled_maps(backbone, torch.zeros(1, 3, side, side), taps, pool).items()
            }
        self.norms, self.heads = nn.ModuleDict(), nn.ModuleDict()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for tap, shape in shapes.items():
                self.norms[tap] = nn.Identity() if tap == AVERAGE else _norm(shape[0])
                self.heads[tap] = head = nn.Linear(shape.numel(), classes)
                nn.init.normal_(head.weight, 0.0, 0.01)
                nn.init.zeros_(head.bias)

    def train(self, mode: bool = True) -> "Heads":
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        with torch.no_grad():
            maps = pooled_maps(self.backbone, images, self._taps, self._pool)
        return [self.heads[tap](self.norms[tap](maps[tap]).flatten(1)) for tap in self._taps]


def _norm(channels: int) -> nn.BatchNorm2d:
    """Batch norm whose weight 1 and bias 0 never learn: affine-free, and what synchronises over ranks."""
    return nn.BatchNorm2d(channels, momentum=0.1).requires_grad_(False)


class LinearTask(Task):
    """What is learnt: images and labels -> the sum of the heads' cross-entropies.

    jitter, light  strength of the colour jitter (0.4) and deviation of the lighting (0.1); 0 leaves it out.
    seed           of the plan, which draws their parameters.
    """

    title = "linear heads"

    def __init__(
        self,
        backbone: nn.Module,
        taps: tuple[str, ...],
        pool: str,
        side: int,
        classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        seed: int,
        jitter: float,
        light: float,
    ):
        self.device, self._taps = device, taps
        self._build = (backbone, taps, pool, side, classes)
        self._classes, self._seed, self._jitter, self._light = classes, seed, jitter, light
        self._mean, self._std = (
            torch.tensor(v, dtype=torch.float32, device=device).view(1, 3, 1, 1) for v in (mean, std)
        )
        self._zero, self._one = (torch.full((3,), v, device=device) for v in (0.0, 1.0))
        self.metrics = ("loss", "count", *(f"right_{tap}" for tap in taps))
        self.figures = {"accuracy": f"held-out accuracy of the best head (chance {1 / classes:.1%})"}

    def build_model(self, arch: str, seed: int) -> nn.Module:
        """The heads on their backbone; `arch` is the backbone's own."""
        return Heads(*self._build, seed)

    def views(self, batch: MicroBatch) -> Tensor:
        """Flipped, jittered, lit and normalised images, fp32 [n, 3, S, S]."""
        images, sample = self._upright(batch), batch.sample
        if self._jitter:
            drawn = augment.colour_jitter(self._seed, sample.rows, sample.epochs, self._jitter, 0.0)
            images = colour.jitter(images, *map(self._sent, drawn))
        images = images / 255
        if self._light:
            alpha = augment.lighting(self._seed, sample.rows, sample.epochs, self._light)
            images = colour.lighting(images, self._sent(alpha))
        return (images - self._mean) / self._std

    def _sent(self, array: NDArray[np.generic]) -> Tensor:
        """On the device. The host waits for no few KiB: they are staged, though not pinned."""
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def _upright(self, batch: MicroBatch) -> Tensor:
        """Images in 0..255, mirrored where the plan says, never turned."""
        return rotate_views(
            batch.pixels, batch.flips, torch.zeros_like(batch.turns[:, :1]), self._zero, self._one, torch.float32
        )

    def loss(self, module: Network, views: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """(sum over images and heads of the cross-entropies, float64 [len(metrics)] sums on the device)."""
        target = self._sent(batch.labels)
        logits: list[Tensor] = [one.float() for one in module(views)]
        losses = [F.cross_entropy(one, target, reduction="sum") for one in logits]
        loss = sum(losses[1:], start=losses[0])
        count = loss.new_full((1,), len(target), dtype=torch.float64)
        right = [(one.argmax(1) == target).sum().double()[None] for one in logits]
        return loss, torch.cat([loss.detach().double()[None], count, *right])

    def summary(self, sums: Tensor) -> dict[str, float]:
        """Mean loss (summed over the heads), each head's accuracy, and the best head's."""
        loss, count, *right = sums.tolist()
        each = {f"accuracy_{tap}": r / count for tap, r in zip(self._taps, right, strict=True)}
        return {"loss": loss / count, "accuracy": max(each.values()), **each}

    @torch.no_grad()
    def evaluate(self, module: Network, batches: Iterable[MicroBatch]) -> Tensor:
        """Summed metrics over this rank's held-out batches; the caller puts the heads in eval mode."""
        total = self._mean.new_zeros(len(self.metrics), dtype=torch.float64)
        for batch in (host.to(self.device) for host in batches):
            total += self.loss(module, (self._upright(batch) / 255 - self._mean) / self._std, batch)[1]
        return total
