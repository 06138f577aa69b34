"""A sweep of collectives over sizes, and what it says: a latency and a rate (alpha and beta); and how much slower
cores are when all ranks work at once."""

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

_SIZES = (256, 1024, 4096, 2**16, 2**20, 2**23)  # bytes
_SMALL = 1024  # bytes: what latency rules
_ROUNDS = 25
_PAIR = 2  # processes, where there is but one to ask
_CROWDED_S = 0.4


@dataclass(frozen=True)
class Timing:
    """One collective of `bytes` bytes a rank among `ranks` ranks. seconds: median, with the quartiles; cpu_s: of a
    rank's cores, in the mean."""

    operation: str
    ranks: int
    bytes: int
    seconds: float
    low: float
    high: float
    cpu_s: float


def sweep(device: torch.device) -> dict[str, Any]:
    """`collectives`: sums over this process's ranks and gatherings, small and large; `crowding`: how many times as long
    work takes that all ranks of a CPU do at once. Alone on a CPU two processes do it on this machine; alone on a GPU
    nobody does. Collective."""
    if dist.get_world_size() > 1:
        return _swept(device)
    return _of_a_pair() if device.type == "cpu" else {"collectives": [], "crowding": 1.0}


def _swept(device: torch.device) -> dict[str, Any]:
    timings = [asdict(one) for one in _timed(device)]
    return {"collectives": timings, "crowding": _crowding() if device.type == "cpu" else 1.0}


def _crowding() -> float:
    """Core-seconds that rank 0 takes for a block's forward and backward pass while all work, over what it takes alone."""
    block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    maps = torch.randn(256, 8, 32, 32)

    def core_s(works: bool) -> float:
        began, began_cpu, done = time.perf_counter(), time.process_time(), 0
        while works and time.perf_counter() - began < _CROWDED_S:
            block(maps).sum().backward()
            done += 1
        spent = time.process_time() - began_cpu
        dist.barrier()
        return spent / max(1, done)

    spent = [(core_s(dist.get_rank() == 0), core_s(True)) for _ in range(5)]
    return max(1.0, statistics.median(together / alone for alone, together in spent)) if dist.get_rank() == 0 else 1.0


def _timed(device: torch.device) -> list[Timing]:
    ranks, out = dist.get_world_size(), []
    for size in _SIZES:
        mine = torch.zeros(size // 4, device=device)
        rows = mine.new_empty(ranks * len(mine))
        out.append(_timing("all_reduce", mine, partial(dist.all_reduce, mine)))
        out.append(_timing("all_gather", mine, partial(dist.all_gather_into_tensor, rows, mine)))
    return out


def _timing(operation: str, tensor: Tensor, work: Callable[[], object]) -> Timing:
    def synchronise() -> None:
        if tensor.is_cuda:
            torch.cuda.synchronize()

    spent, cpu = [], 0.0
    for number in range(_ROUNDS + 2):
        dist.all_reduce(torch.zeros(1, device=tensor.device))  # all begin together
        synchronise()
        began, began_cpu = time.perf_counter(), time.process_time()
        work()
        synchronise()
        if number >= 2:
            spent.append(time.perf_counter() - began)
            cpu += time.process_time() - began_cpu
    low, median, high = statistics.quantiles(spent, n=4)
    return Timing(operation, dist.get_world_size(), tensor.nbytes, median, low, high, cpu / _ROUNDS)


def _of_a_pair() -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        found, answers = Path(folder) / "store", context.Queue()
        pair = [context.Process(target=_one_of_a_pair, args=(rank, str(found), answers)) for rank in range(_PAIR)]
        for process in pair:
            process.start()
        result: dict[str, Any] = answers.get(timeout=300)
        for process in pair:
            process.join()
    return result


def _one_of_a_pair(rank: int, store: str, answers: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=_PAIR)
    found = _swept(torch.device("cpu"))
    if rank == 0:
        answers.put(found)
    dist.destroy_process_group()


@dataclass(frozen=True)
class Fit:
    """latency_s: of a hop of a ring; rate: bytes/s of one rank to the next; each (low, value, high); cpu_share: of a
    core, that a rank is busy with while it communicates; ranks: of the sweep."""

    latency_s: tuple[float, float, float]
    rate: tuple[float, float, float]
    cpu_share: float
    ranks: int


def fit(timings: list[Timing]) -> Fit:
    """Of a sweep, for the median and both quartiles: the rate by relative least squares over the sizes of sums, the
    latency by what small sums and gatherings take besides. A sum goes around the ring twice, a gathering once."""
    ranks = timings[0].ranks
    sums = [one for one in timings if one.operation == "all_reduce"]

    def rate(pick: Callable[[Timing], float]) -> float:
        times = np.array([pick(one) for one in sums])
        design = np.array([[1.0, one.bytes] for one in sums]) / times[:, None]
        per_byte = float(np.linalg.lstsq(design, np.ones(len(times)), rcond=None)[0][1])
        return 2 * (ranks - 1) / ranks / per_byte

    def latency(pick: Callable[[Timing], float], rate: float) -> float:
        small = [one for one in timings if one.bytes <= _SMALL]
        passed = sum(one.bytes * (2 / ranks if one.operation == "all_reduce" else 1) / rate for one in small)
        hops = sum(2 if one.operation == "all_reduce" else 1 for one in small)
        return max(1e-9, (sum(map(pick, small)) / (ranks - 1) - passed) / hops)

    picks: tuple[Callable[[Timing], float], ...] = (attrgetter("low"), attrgetter("seconds"), attrgetter("high"))
    rates = [rate(pick) for pick in picks]
    latencies = sorted(latency(pick, rates[1]) for pick in picks)
    busy = sum(one.cpu_s for one in timings) / sum(one.seconds for one in timings)
    low, middle, high = latencies
    return Fit((low, middle, high), (min(rates), rates[1], max(rates)), min(1.0, busy), ranks)
