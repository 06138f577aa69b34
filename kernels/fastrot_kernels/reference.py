"""The truth: rotated views in plain torch, on any device."""

import torch
from torch import Tensor

from fastrot_kernels.layout import Crops, channels_first


def obstacle(_device: torch.device) -> str:
    """Nothing: it runs everywhere."""
    return ""


def rotate_views(crops: Crops) -> Tensor:
    """Flip, turn, normalise; the result is that of `op.rotate_views`."""
    x, flips, turns, mean, std, *_ = crops
    in_channels = x.shape[3]
    upright = torch.where(flips.bool()[:, None, None, None], x.flip(2), x)
    turned = torch.stack([upright.rot90(k, dims=(1, 2)) for k in range(4)])  # uint8 [4, n, S, S, C]
    image = torch.arange(x.shape[0], device=x.device)[:, None]
    views = turned[(turns & 3).long(), image].flatten(0, 1)  # uint8 [n*V, S, S, C]

    out = crops.empty_views()
    out[..., :in_channels] = (views.float() - mean) / std
    out[..., in_channels:] = 0
    return channels_first(out)
