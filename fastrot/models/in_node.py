"""Norms of one node's GPUs, which read one another's memory over NVLink instead of asking NCCL: torch's symmetric memory."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed._symmetric_memory as symmetric
from torch import Tensor
from torch.distributed.distributed_c10d import GroupName

from fastrot.errors import UserError
from fastrot.models.over_ranks import Group
from fastrot.profiling.clock import communicating

_MOST = 2**16  # values of a message: moments of two norms of 10,922 channels


class InNode(Group):
    """A Group whose ranks write a message into their own memory and, past one barrier in the stream, read all in order.

    One message is under way at a time, and two stretches of memory take turns: who is past a message's barrier knows
    that all have read the one before. A forward and backward pass sends an even number, so a replayed graph begins with
    the stretch that it did not end with.
    """

    _stretches: list[Tensor]  # memory that must live as long
    _shared: list[Any]  # torch's handles of it
    _timeout_ms: int
    _sent = 0

    @classmethod
    def of(cls, group: Group, device: torch.device, timeout_s: float) -> "InNode":
        """Collective, and before anything is captured. timeout_s: that a rank waits for the others; then its GPU raises.
        Raises UserError where these GPUs share no memory."""
        here = cls(*group)
        here._timeout_ms = round(1000 * timeout_s)
        try:
            here._stretches = [symmetric.empty(_MOST, dtype=torch.float32, device=device) for _ in range(2)]
            here._shared = [symmetric.rendezvous(stretch, GroupName(group.name)) for stretch in here._stretches]
        except RuntimeError as error:
            why = str(error).partition("\n")[0]
            raise UserError(f"engine.symmetric_memory: these GPUs share no memory ({why}); set it to false") from None
        return here

    def gathering(self, mine: Tensor) -> Callable[[], Tensor]:
        shared = self._shared[self._sent % 2]
        self._sent += 1
        shared.get_buffer(shared.rank, mine.shape, mine.dtype).copy_(mine)
        return lambda: communicating(self._read, shared, mine)

    def summing(self, mine: Tensor) -> Callable[[], Tensor]:
        arrive = self.gathering(mine)
        return lambda: arrive().sum(0)

    def _read(self, shared: Any, mine: Tensor) -> Tensor:
        """All ranks' messages, as [size, *shape of this rank's]."""
        shared.barrier(timeout_ms=self._timeout_ms)
        return torch.stack([shared.get_buffer(rank, mine.shape, mine.dtype) for rank in range(self.size)])
