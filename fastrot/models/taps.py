"""The protocol's taps and pools: a batch of images to a row of numbers a tap."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F
from torchvision.models import ResNet

from fastrot.errors import UserError
from fastrot.models.resnet import tap_maps

TAPS = ("feature1", "feature2", "feature3", "feature4", "feature5")
AVERAGE = "avg"  # stage 4, global average: what k-NN and the AvgPool head read
# kernel, stride, padding of each tap's average pooling, for input of 224; zeros of the padding are counted
SPECIFIED = ((10, 10, 4), (16, 8, 0), (13, 5, 0), (8, 3, 0), (6, 1, 0))
ADAPTIVE = (12, 6, 4, 3, 2)


def _specified(x: Tensor, at: int) -> Tensor:
    kernel, stride, padding = SPECIFIED[at]
    if min(x.shape[2:]) + 2 * padding < kernel:
        raise UserError(
            f"pool specified is for images of 224: {TAPS[at]} is only {x.shape[2]}x{x.shape[3]}; use adaptive"
        )
    return F.avg_pool2d(x, kernel, stride, padding)


def _adaptive(x: Tensor, at: int) -> Tensor:
    return F.adaptive_avg_pool2d(x, ADAPTIVE[at])


def _gap(x: Tensor, at: int) -> Tensor:
    return F.adaptive_avg_pool2d(x, 1)


POOLS: dict[str, Callable[[Tensor, int], Tensor]] = {"specified": _specified, "gap": _gap, "adaptive": _adaptive}


def pooled_maps(model: ResNet, images: Tensor, taps: tuple[str, ...], pool: str) -> dict[str, Tensor]:
    """The taps asked for, pooled, [n, C, h, w] each; `avg` is stage 4's global average under any pool.

    images  [n, 3, H, W], normalised; "specified" fits H = W = 224.
    Source  protocol "Feature taps" (mmselfsup 0.11, multi_pooling.py).
    """
    maps = tap_maps(model, images)
    out = {}
    for name in taps:
        at = TAPS.index(name) if name in TAPS else len(TAPS) - 1
        out[name] = (_gap if name == AVERAGE else POOLS[pool])(maps[at], at)
    return out


def flat_features(model: ResNet, images: Tensor, taps: tuple[str, ...], pool: str) -> dict[str, Tensor]:
    """pooled_maps, each flattened in the order C, h, w: [n, D]."""
    return {name: x.flatten(1) for name, x in pooled_maps(model, images, taps, pool).items()}
