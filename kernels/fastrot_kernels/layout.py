"""The memory every backend writes into."""

import torch
from torch import Tensor


def empty_views(x: Tensor, turns: Tensor, dtype: torch.dtype, channels: int) -> Tensor:
    """Uninitialised pixels for the views, dtype [n*V, S, S, C'], contiguous.

    x  uint8 [n, S, S, C].    turns  uint8 [n, V].    channels  C'.
    """
    n, side = x.shape[:2]
    return torch.empty((n * turns.shape[1], side, side, channels), dtype=dtype, device=x.device)


def channels_first(views: Tensor) -> Tensor:
    """The same memory as [n*V, C', S, S] with the exact strides of torch.channels_last.

    `contiguous(memory_format=...)` would keep whatever strides an axis of length 1 has.
    """
    return views.permute(0, 3, 1, 2)
