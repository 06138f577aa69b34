"""What norms say to one another over ranks: small messages, sent early and waited for late.

By torch's functional collectives, which name their group: one way for eager steps, compilers, captured graphs, and
copies of a network.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives  # what a compiler knows of them
from torch import Tensor

from fastrot.profiling.clock import communicating
from fastrot_kernels import norm

_collectives = torch.ops._c10d_functional


class Group(NamedTuple):
    """Ranks whose views batch norm sees together. name: of their process group; size: how many they are."""

    name: str
    size: int

    def gathering(self, mine: Tensor) -> Callable[[], Tensor]:
        """Send this rank's [N]; what is returned waits, and gives all ranks' as [size, N]."""
        sent = _collectives.all_gather_into_tensor(mine, self.size, self.name)
        return lambda: _arrived(sent).view(self.size, -1)

    def summing(self, mine: Tensor) -> Callable[[], Tensor]:
        """Send this rank's; what is returned waits, and gives the sum."""
        sent = _collectives.all_reduce(mine, "sum", self.name)
        return lambda: _arrived(sent)


def _arrived(sent: Tensor) -> Tensor:
    arrived: Tensor = communicating(_collectives.wait_tensor, sent)
    return arrived


def neighbours(groups: int, timeout_s: float) -> Group | None:
    """This rank's among so many groups of one size, whose ranks follow one another: within a node first, where they
    fit. None where each rank is alone. Every rank calls it; timeout_s: of the groups that are made."""
    rank, size = dist.get_rank(), dist.get_world_size() // groups
    if size == 1:
        return None
    assert dist.group.WORLD is not None
    if groups == 1:
        return Group(dist.group.WORLD.group_name, size)
    first = rank - rank % size
    mine = dist.new_group(
        list(range(first, first + size)), timedelta(seconds=timeout_s), use_local_synchronization=True
    )
    return Group(mine.group_name, size)


def merging(over_ranks: Group | None, *moments: Tensor) -> Callable[[], list[Tensor]]:
    """Begin to merge this rank's moments [3, C] of some norms with the other ranks', whose counts may differ, in one
    message; what is returned waits, and gives them."""
    if over_ranks is None:
        return lambda: list(moments)
    channels = [each.shape[1] for each in moments]
    arrive = over_ranks.gathering(_joined(moments).flatten())
    return lambda: _parted(norm.merge(arrive().view(-1, 3, sum(channels))), channels)


def summing(over_ranks: Group | None, *sums: Tensor) -> Callable[[], list[Tensor]]:
    """Begin to add up this rank's sums [2, C] of some norms with the other ranks', in one message; what is returned
    waits, and gives them."""
    if over_ranks is None:
        return lambda: list(sums)
    channels = [each.shape[1] for each in sums]
    arrive = over_ranks.summing(_joined(sums))
    return lambda: _parted(arrive(), channels)


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _parted(whole: Tensor, channels: list[int]) -> list[Tensor]:
    return [part.contiguous() for part in whole.split(channels, 1)]
