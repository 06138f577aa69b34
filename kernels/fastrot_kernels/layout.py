"""What every backend is asked for, and the memory it writes into."""

from typing import NamedTuple

import torch
from torch import Tensor


class Crops(NamedTuple):
    """Upright crops and the views to make of them: `op.rotate_views`'s arguments, checked.

    x          uint8 [n, S, S, C].    flips  uint8 [n].    turns  uint8 [n, V].
    mean, std  float32 [C].
    dtype      of the views; channels: C', theirs, or 0 (until checked) for C.
    """

    x: Tensor
    flips: Tensor
    turns: Tensor
    mean: Tensor
    std: Tensor
    dtype: torch.dtype
    channels: int = 0

    def empty_views(self) -> Tensor:
        """Uninitialised pixels for the views, dtype [n*V, S, S, C'], contiguous, where x lies."""
        side = self.x.shape[1]
        shape = (self.turns.numel(), side, side, self.channels)
        return torch.empty(shape, dtype=self.dtype, device=self.x.device)


def channels_first(views: Tensor) -> Tensor:
    """The same memory as [n*V, C', S, S] with the exact strides of torch.channels_last.

    `contiguous(memory_format=...)` would keep whatever strides an axis of length 1 has.
    """
    return views.permute(0, 3, 1, 2)
