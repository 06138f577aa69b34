"""What `fastrot tune` found for a machine: how it chooses, and the file that keeps it."""

import hashlib
import json
import math
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fastrot.config import Data
from fastrot.distributed import Ranks
from fastrot.errors import UserError
from fastrot.files import read_json, write_text
from fastrot.machine import cache_folder, cores, processor

PREFETCH = 3  # micro-batches ahead where neither config nor tune says
_NEAR = 0.97  # a setting this close to the fastest is as fast
_UNSURE = 0.1  # of the times that a comparison may be wrong
_LOAD = 0.9  # of the loader's pace: a step that takes batches faster waits at any depth
_WAIT = 0.01  # of its time that a step may wait for data
_DEEPEST = 8


@dataclass(frozen=True)
class Tuned:
    """threads and prefetch a rank; hw_decoder_load None where DALI does not decode on a GPU."""

    threads: int
    prefetch: int
    hw_decoder_load: float | None
    found: str
    """By whom and when, for a person."""


def place(data: Data, ranks: Ranks) -> Path:
    """The file for this machine, as many ranks on it, this decoder and crop."""
    gpu = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "no GPU"
    where = (
        platform.machine(),
        processor(),
        cores(),
        gpu,
        ranks.local_world,
        data.decode,
        data.decode_on,
        data.crop,
    )
    key = hashlib.sha256(json.dumps(where).encode()).hexdigest()[:16]
    return cache_folder() / "tune" / f"{data.decode}-{data.crop}-{key}.json"


def read(path: Path) -> Tuned | None:
    """What was found, or None where nothing was. Raises UserError where the file is damaged."""
    try:
        tuned = read_json(path, Tuned)
        if min(tuned.threads, tuned.prefetch) < 1 or not 0 <= (tuned.hw_decoder_load or 0) <= 1:
            raise ValueError("its numbers make no sense")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: not what fastrot tune wrote ({error}); remove it, or run fastrot tune again"
        ) from None
    return tuned


def write(path: Path, tuned: Tuned) -> None:
    """Keep it. Raises UserError where the cache cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(asdict(tuned), indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); set FASTROT_CACHE to a folder that can"
        ) from None


def thread_counts(share: int) -> list[int]:
    """Worth a try where a rank's share of the cores is `share`: less leaves room for others, more hides reads."""
    return sorted({max(1, round(share * part)) for part in (0.5, 0.75, 1, 1.5, 2)})


def fastest(paces: dict[float, list[float]], default: float) -> float | None:
    """The fastest of the settings that are faster than the default; the default where none is; None where the noise
    does not tell. {setting: images/s, a round each}; the settings of a round ran one after another."""
    faster = {one: at_least(pace, paces[default], 1 / _NEAR) for one, pace in paces.items() if one != default}
    if sure := [one for one, verdict in faster.items() if verdict]:
        return max(sure, key=lambda one: statistics.median(paces[one]))
    return None if None in faster.values() else default


def fewest(paces: dict[float, list[float]], best: float) -> float | None:
    """The smallest setting that is as fast as the best; None where the noise does not tell."""
    for one in sorted(one for one in paces if one < best):
        as_fast = at_least(paces[one], paces[best], _NEAR)
        if as_fast or as_fast is None:
            return one if as_fast else None
    return best


def most_that_meets(demand: float, paces: dict[float, list[float]]) -> float | None:
    """The largest setting that is as fast as is asked for, else the fastest; None where the noise does not tell."""
    for one in sorted(paces, reverse=True):
        meets = at_least(paces[one], [demand] * len(paces[one]), 1.0)
        if meets or meets is None:
            return one if meets else None
    return max(paces, key=lambda one: statistics.median(paces[one]))


def at_least(paces: Sequence[float], others: Sequence[float], ratio: float) -> bool | None:
    """Whether one pace is `ratio` of the other or more, by the rounds of both; None where they do not tell."""
    low, middle, high = interval([one / other for one, other in zip(paces, others, strict=True)])
    if low >= ratio or high < ratio:
        return low >= ratio
    return middle >= ratio if high / low < _NEAR**-2 else None  # as near as makes no odds


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(lower end, median, upper end) of what the median may be, nine times in ten; whatever the noise looks like.

    The median lies below the k lowest of n values, or above the k highest, as n coins fall at most k times heads.
    """
    ordered, n = sorted(values), len(values)
    cut, chance = 0, 2.0 * 0.5**n
    while chance + 2 * math.comb(n, cut + 1) * 0.5**n <= _UNSURE:
        cut += 1
        chance += 2 * math.comb(n, cut) * 0.5**n
    return ordered[cut], statistics.median(ordered), ordered[n - 1 - cut]


def waiting(seconds: Sequence[float], depth: int, step: float | None = None) -> float:
    """Share of its time that a steady step waits for data with `depth` batches ahead.

    seconds  that the loader took for one batch after another. step: seconds; default: as long as 0.9 of the loader's
             pace allows.
    """
    step = statistics.fmean(seconds) / _LOAD if step is None else step
    start = clock = sum(seconds[:depth])  # the queue is full when the first step begins
    taken: list[float] = []  # when the step took each batch
    ready = waited = 0.0
    for at, took in enumerate(seconds):
        ready = max(ready, taken[at - depth] if at >= depth else 0.0) + took  # a full queue holds the loader up
        waited += max(0.0, ready - clock)
        clock = max(clock, ready)
        taken.append(clock)
        clock += step
    return waited / (clock - start)


def depth_for(seconds: Sequence[float]) -> int:
    """The fewest batches ahead with which a step waits under 1% of its time; at most 8."""
    return next((depth for depth in range(2, _DEEPEST) if waiting(seconds, depth) < _WAIT), _DEEPEST)
