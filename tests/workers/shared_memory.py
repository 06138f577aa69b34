"""torch's symmetric memory played on the host: files that all ranks map, and gloo's barrier."""

import tempfile
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist


class _Shared:
    """A rank's handle of its own stretch and the others'."""

    def __init__(self, stretch: torch.Tensor, group_name: str):
        self._group = dist.distributed_c10d._resolve_process_group(group_name)
        self.rank, size = dist.get_rank(self._group), dist.get_world_size(self._group)
        place = [tempfile.mkdtemp() if self.rank == 0 else None]
        dist.broadcast_object_list(place, group=self._group, group_src=0)
        folder = Path(place[0])
        (folder / str(self.rank)).write_bytes(bytes(stretch.nbytes))
        dist.barrier(self._group)
        self._memory = [
            torch.from_file(str(folder / str(rank)), shared=True, size=stretch.numel(), dtype=stretch.dtype)
            for rank in range(size)
        ]
        dist.barrier(self._group)
        (folder / str(self.rank)).unlink()  # the maps stay
        dist.barrier(self._group)
        if self.rank == 0:
            folder.rmdir()

    def get_buffer(self, rank, sizes, dtype):
        assert dtype == self._memory[rank].dtype
        return self._memory[rank][: sizes.numel()].view(sizes)

    def barrier(self, channel=0, timeout_ms=0):
        dist.barrier(self._group)


def played():
    """Within, fastrot.models.in_node finds it in torch's place."""
    return mock.patch.multiple(
        "torch.distributed._symmetric_memory",
        empty=lambda size, dtype, device: torch.empty(size, dtype=dtype),
        rendezvous=_Shared,
    )
