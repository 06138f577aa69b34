"""Rotated views on a CPU without a compiler: normalise each source once, then one strided copy a view."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastrot_kernels.layout import Crops, channels_first


def obstacle(device: torch.device) -> str:
    """Why this backend cannot run on such a device; empty if it can."""
    return "" if device.type == "cpu" else f"tensors are on {device.type}, not the CPU"


def rotate_views(crops: Crops) -> Tensor:
    """As `reference.rotate_views`, bit for bit.

    numpy copies because it has negative strides: a flip or a turn is then a view, where torch
    would copy the pixels once to flip them and again to place them.
    """
    out = crops.empty_views()
    source, target = _pixels(_normalised(crops)), _pixels(out)
    views = crops.turns.shape[1]
    for i, (flip, ks) in enumerate(zip(crops.flips.tolist(), crops.turns.tolist(), strict=True)):
        image = source[i, :, ::-1] if flip else source[i]
        for v, k in enumerate(ks):
            target[i * views + v] = np.rot90(image, k)  # reads k as k & 3
    return channels_first(out)


def _normalised(crops: Crops) -> Tensor:
    """Normalised, padded sources, dtype [n, S, S, C'].

    A byte has 256 values: their quotients are computed once and looked up.
    """
    x, _, _, mean, std, dtype, channels = crops
    table = ((torch.arange(256).float()[:, None] - mean) / std).to(dtype)  # [256, C]
    out = torch.zeros((*x.shape[:3], channels), dtype=dtype)
    for c in range(x.shape[3]):
        out[..., c] = table[:, c][x[..., c].int()]
    return out


def _pixels(images: Tensor) -> NDArray[np.void]:
    """The memory of a contiguous [..., S, S, C'] as [..., S, S] whole pixels of C' values."""
    raw = images.view(torch.uint8).numpy()  # bytes, since numpy has no bfloat16
    return raw.view(f"V{raw.shape[-1]}")[..., 0]
