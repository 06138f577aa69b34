"""Ranks: who we are, how we start and end, and saying the same thing on all of them."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from fastrot import machine
from fastrot.errors import Fault, UserError
from fastrot.watch import die_with_launcher

T = TypeVar("T")
# what a launcher would set, for a process that has none; no launcher gives port 0
_ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


@dataclass(frozen=True)
class Ranks:
    """This process among its peers, and the device it works on."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


def start(timeout_s: float = 7200) -> Ranks:
    """Join the process group that the launcher describes, or be a group of one.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE as deepspeed, torchrun and Slurm wrappers
    set them. The time-out covers rank 0's indexing of a large cold data set. NCCL where there is CUDA, gloo elsewhere.
    """
    machine.set_caches()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world)
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"rank {rank}: no GPU {local_rank} here, only {torch.cuda.device_count()}; start at most one rank a GPU"
            )
        torch.cuda.set_device(local_rank)
        device, backend = torch.device("cuda", local_rank), "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
        # the cores are shared with the other ranks here; more threads than cores wait for one another
        torch.set_num_threads(max(1, machine.cores() // local_world))
    if "RANK" in os.environ:
        die_with_launcher()
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    else:  # a plain `python`: DeepSpeed wants the variables too, else it looks for MPI
        os.environ.update(_ALONE)
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return Ranks(rank, world, local_rank, local_world, device)


def end() -> None:
    """Leave the process group; without this an exit may turn non-zero after the work is done."""
    if dist.is_initialized():
        dist.destroy_process_group()
    if os.environ.get("MASTER_PORT") == _ALONE["MASTER_PORT"]:
        for name in _ALONE:
            os.environ.pop(name, None)


def on_first(ranks: Ranks, work: Callable[[], T]) -> T:
    """Do something on rank 0 alone; every rank gets its result, or raises its UserError or Fault."""
    outcome: list = [None, None]
    if ranks.first:
        try:
            outcome[0] = work()
        except (UserError, Fault) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
