"""Ranks: who we are, how we start and end, saying the same thing on all of them, and what to say when one is lost."""

import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from fractions import Fraction
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from fastrot import launcher, machine
from fastrot.errors import Fault, LostPeer, UserError
from fastrot.watch import Process, die_with_launcher

T = TypeVar("T")
# what a launcher would set, for a process that has none; no launcher gives port 0
_ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
_JOIN_S = 600  # until every rank has started
_WAIT_S = 86_400  # for rank 0's indexing of a large cold data set; training sets its own limit
_SEEN_DEAD_S = 2  # a killed process's connections close a moment before it is gone


class Peer(NamedTuple):
    """A rank's process, as the machine that it runs on knows it. host: for a person, which two machines may share;
    node: theirs alone; cpus: that it may use."""

    host: str
    process: Process
    node: str = ""
    cpus: frozenset[int] = frozenset()

    @classmethod
    def here(cls) -> "Peer":
        cpus = frozenset(os.sched_getaffinity(0))
        return cls(socket.gethostname(), Process.of(os.getpid()), machine.booted(), cpus)


@dataclass(frozen=True)
class Ranks:
    """This process among its peers, and the device it works on. peers: by rank, this one too; none where it is alone."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device
    peers: tuple[Peer, ...] = ()

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def cores(self) -> int:
        """This rank's share of those that it may use: a launcher may have given each rank its own."""
        if not self.peers:
            return max(1, machine.cores() // self.local_world)
        mine = self.peers[self.rank]
        users = Counter(cpu for peer in self.peers if peer.node == mine.node for cpu in peer.cpus)
        return max(1, int(sum(Fraction(1, users[cpu]) for cpu in mine.cpus)))


def start() -> Ranks:
    """Join the process group that the launcher describes, or be a group of one.

    Reads what launcher.py reads. NCCL where there is CUDA, gloo elsewhere. Raises Fault where the ranks do not come
    together.
    """
    machine.set_caches()
    place = launcher.settle(os.environ)
    rank, world, local_rank, local_world = place[1:5] if place else (0, 1, 0, 1)
    if torch.cuda.is_available():
        gpu = _gpu(rank, local_rank)
        torch.cuda.set_device(gpu)
        device, backend = torch.device("cuda", gpu), "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    ranks = Ranks(rank, world, local_rank, local_world, device)
    if place:
        die_with_launcher()
        ranks = _join(ranks, backend)
    else:
        if line := launcher.alone_in_job(os.environ):
            print(line, file=sys.stderr, flush=True)
        os.environ.update(_ALONE)  # a plain `python`: DeepSpeed wants the variables too, else it looks for MPI
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]  # torch's, not in __all__
    if device.type == "cpu":  # more threads than cores wait for one another
        torch.set_num_threads(ranks.cores)
    return ranks


def _gpu(rank: int, local_rank: int) -> int:
    """A rank's GPU: the one of its number; or the only one, where srun or mpirun shows each rank its own.

    Raises UserError where there is none for it.
    """
    seen = torch.cuda.device_count()
    if local_rank < seen:
        return local_rank
    if seen == 1 and "SLURM_STEP_ID" in os.environ:
        return 0
    raise UserError(f"rank {rank}: no GPU {local_rank} here, only {seen}; start at most one rank a GPU")


def _join(ranks: Ranks, backend: str) -> Ranks:
    """The process group of all ranks, who then know one another."""
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=_JOIN_S))
        limit_waits(_WAIT_S)
        return replace(ranks, peers=tuple(of_all(ranks, Peer.here())))
    except RuntimeError as error:  # DistError too
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise Fault(f"{ranks.world} ranks did not come together at {where}: {_first_line(error)}") from None


def of_all(ranks: Ranks, mine: T) -> list[T]:
    """Every rank's, by rank; collective."""
    found: list[Any] = [None] * ranks.world
    dist.all_gather_object(found, mine)
    return found


def agree(ranks: Ranks, wrong: str) -> None:
    """Raises UserError on every rank where one of them has something wrong to say; collective."""
    for rank, one in enumerate(of_all(ranks, wrong)):
        if one:
            host = f" on {ranks.peers[rank].host}" if ranks.peers else ""
            raise UserError(f"rank {rank}{host}: {one}" if ranks.world > 1 else one)


def limit_waits(seconds: float) -> None:
    """From here on a collective that takes longer ends this rank."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


@contextmanager
def lost_peer_is_a_fault(ranks: Ranks) -> Iterator[None]:
    """What torch raises where a rank is gone or does not answer becomes a LostPeer, one line that names it."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "/gloo/" not in str(error):
            raise
        raise LostPeer(_lost(ranks, error)) from None


def _lost(ranks: Ranks, error: RuntimeError) -> str:
    """Who is gone or stopped, as far as can be seen from this machine."""
    slow = "imed out" in str(error) or "imeout" in str(error)
    here = socket.gethostname()
    mine = [(rank, peer.process) for rank, peer in enumerate(ranks.peers) if peer.host == here]
    until = time.monotonic() + (0 if slow else _SEEN_DEAD_S)
    while not (gone := [f"rank {rank} (process {one.pid})" for rank, one in mine if not one.lives]):
        if time.monotonic() >= until:
            break
        time.sleep(0.05)
    stopped = [f"rank {rank} (process {one.pid})" for rank, one in mine if one.stopped]
    again = "start again: a run goes on from its last checkpoint"
    if gone:
        return f"{', '.join(gone)} {'are' if len(gone) > 1 else 'is'} gone; {again}"
    if stopped:
        return f"{', '.join(stopped)} {'are' if len(stopped) > 1 else 'is'} stopped and did not answer for run.timeout; {again}"
    what = "does not answer within run.timeout" if slow else "on another machine is gone"
    return f"a rank {what} ({_first_line(error)}); {again}"


def _first_line(error: Exception) -> str:
    """Without the source file that torch's own messages begin with."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line.partition("] ")[2] if line.startswith("[") and "] " in line else line


def end() -> None:
    """Leave the process group; without this an exit may turn non-zero after the work is done."""
    if dist.is_initialized():
        dist.destroy_process_group()
    if os.environ.get("MASTER_PORT") == _ALONE["MASTER_PORT"]:
        for name in _ALONE:
            os.environ.pop(name, None)


def on_first(ranks: Ranks, work: Callable[[], T]) -> T:
    """Do something on rank 0 alone; every rank gets its result, or raises what rank 0 raised.

    What is no error of ours is raised on the others as a Fault in its words: it may not survive the way.
    """
    outcome: list[Any] = [None, None]
    raised: BaseException | None = None
    if ranks.first:
        try:
            outcome[0] = work()
        except BaseException as error:  # whatever it is: the others wait below
            raised = error
            ours = isinstance(error, UserError | Fault)
            outcome[1] = error if ours else Fault(f"rank 0: {type(error).__name__}: {error}")
    dist.broadcast_object_list(outcome, src=0)
    if raised is not None:
        raise raised
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def on_all(ranks: Ranks, work: Callable[[], T]) -> T:
    """Do something on every rank; where it fails on one, all raise what the first such rank raised. Collective."""
    result: Any = None
    error: UserError | Fault | None = None
    try:
        result = work()
    except (UserError, Fault) as raised:
        error = raised
    for said in of_all(ranks, error):
        if said is not None:
            raise said
    found: T = result
    return found
