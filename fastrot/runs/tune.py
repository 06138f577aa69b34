"""`fastrot tune`: how many threads, how far ahead, and how much for the hardware decoder, here and for this data."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch.distributed as dist

from fastrot import distributed, terminal
from fastrot.config import Config
from fastrot.data import loader_settings
from fastrot.data.build import crop_at, make_loader, open_manifest, settings_of
from fastrot.data.decode import GPUS_OWN
from fastrot.data.decode.nvjpeg import HARDWARE_LOAD
from fastrot.data.loader_settings import Tuned
from fastrot.data.manifest import Manifest
from fastrot.data.remarks import describe
from fastrot.distributed import Ranks
from fastrot.errors import UserError
from fastrot.runs.arithmetic import arithmetic

_WARM = 3  # batches before the clock starts
_LEAST = 8  # batches timed, however slow
_ROUNDS = (5, 3, 3)  # alternating, so that a busy moment hits no setting alone; more where the first do not tell
_MOST_STEPS = 10**6
_SHARES = (0.0, 0.25, 0.5, 0.65, 0.8, 0.9, HARDWARE_LOAD)  # of the hardware decoder
_Paces = dict[float, list[float]]  # {setting: images/s of all ranks, a round each}


@dataclass(frozen=True)
class _Bench:
    config: Config
    manifest: Manifest
    ranks: Ranks
    seconds: float

    def compare(
        self, settings: dict[float, Tuned], title: str, choose: Callable[[_Paces], float | None]
    ) -> tuple[float | None, _Paces, dict[float, list[float]]]:
        """What is chosen, None where the rounds do not tell; the paces; and the seconds of each setting's batches."""
        paces: _Paces = {one: [] for one in settings}
        took: dict[float, list[float]] = {one: [] for one in settings}
        chosen = None
        for rounds in _ROUNDS:
            turns = [one for _ in range(rounds) for one in settings]
            for one in terminal.track(turns, len(turns), title) if self.ranks.first else turns:
                pace, seconds = self._lap(settings[one])
                paces[one].append(pace)
                took[one] += seconds
            if (chosen := choose(paces)) is not None:
                break
        return chosen, paces, took

    def _lap(self, settings: Tuned) -> tuple[float, list[float]]:
        mine = list(self._intervals(settings))
        all_ranks: list[Any] = [None] * self.ranks.world
        dist.all_gather_object(all_ranks, mine)
        slowest = max(all_ranks, key=statistics.fmean)  # a step waits for it
        n = arithmetic(self.config, self.ranks.world, len(self.manifest))
        return n.images / (n.micro_steps * statistics.fmean(slowest)), slowest

    def _intervals(self, settings: Tuned) -> Iterator[float]:
        """Seconds from micro-batch to micro-batch of this rank, drained as fast as they come."""
        config, ranks = self.config, self.ranks
        n = arithmetic(config, ranks.world, len(self.manifest))
        loader, _ = make_loader(config, self.manifest, ranks, n.largest, None, settings)
        crop = partial(crop_at, config)
        steps = loader.train(range(_MOST_STEPS), 0, n.images, n.ranks, ranks.rank, n.micro_steps, crop)
        batches = (batch for step in steps for batch in step.micro_steps)
        try:
            for _ in range(_WARM):
                next(batches)
            start = last = time.perf_counter()
            count = 0
            while count < _LEAST or last - start < self.seconds:
                next(batches)
                count, before, last = count + 1, last, time.perf_counter()
                yield last - before
        finally:
            steps.close()
            loader.close()


def tune(config: Config, ranks: Ranks, seconds: float, demand: float | None = None) -> dict[str, Any]:
    """Run the loader for `seconds` at each of some settings, choose, and keep the choice in the cache; run it longer
    where the machine's own noise hides the difference, and keep nothing where it hides it still.

    To be started as the training will be: the ranks of a machine share its cores, and run together here.
    demand  images/s of all ranks that the training takes; None: the hardware decoder's share stays as it is.
    """
    if seconds <= 0:
        raise UserError(f"--seconds {seconds:g}: must be above 0")
    if demand is not None and demand <= 0:
        raise UserError(f"--images-per-s {demand:g}: must be above 0")
    manifest = open_manifest(config.data.train, config, ranks, "data.train")
    describe(manifest, terminal.console().print if ranks.first else lambda line: None)
    bench = _Bench(config, manifest, ranks, seconds / _ROUNDS[0])
    found = f"by fastrot tune, {time.strftime('%Y-%m-%d')}"
    settings = replace(settings_of(config, ranks), hw_decoder_load=config.data.hw_decoder_load, found=found)
    share = ranks.cores
    tried: dict[float, Tuned] = {n: replace(settings, threads=n) for n in loader_settings.thread_counts(share)}
    threads, by_threads, took = bench.compare(tried, "threads", partial(_fewest_of_the_fastest, share))
    result = {
        "threads": threads,
        "prefetch": None,
        "hw_decoder_load": None,
        "images_per_s": None,
        "images_per_s_by_threads": _medians(by_threads),
        "images_per_s_by_hw_decoder_load": {},
        "spread": _spread(by_threads),
        "waiting_by_prefetch": {},
        "kept": None,
    }
    if threads is not None:
        settings, pace, of_each = tried[threads], statistics.median(by_threads[threads]), took[threads]
        on_gpu = (
            ranks.device.type == "cuda" and config.data.decode in ("auto", *GPUS_OWN) and config.data.decode_on != "cpu"
        )
        if on_gpu and demand is not None:
            loads = {load: replace(settings, hw_decoder_load=load) for load in _SHARES}
            choose = partial(loader_settings.most_that_meets, demand)
            load, by_load, took = bench.compare(loads, "share of the hardware decoder", choose)
            result["images_per_s_by_hw_decoder_load"] = _medians(by_load)
            if load not in (None, HARDWARE_LOAD):
                settings, pace, of_each = loads[load], statistics.median(by_load[load]), took[load]
        result |= _kept(settings, of_each, config, ranks) | {"images_per_s": pace}
    if ranks.first:
        _show(result, share)
    return result


def _fewest_of_the_fastest(default: int, paces: _Paces) -> float | None:
    best = loader_settings.fastest(paces, default)
    return None if best is None else loader_settings.fewest(paces, best)


def _medians(paces: _Paces) -> dict[float, float]:
    return {one: statistics.median(pace) for one, pace in paces.items()}


def _spread(paces: _Paces) -> float:
    """How far a setting's own rounds lie apart, of their median; of the settings the middle one."""
    return statistics.median((max(pace) - min(pace)) / statistics.median(pace) for pace in paces.values())


def _kept(settings: Tuned, took: list[float], config: Config, ranks: Ranks) -> dict[str, Any]:
    """The settings with the prefetch that suits them, written to the cache; their part of the result."""
    settings = replace(settings, prefetch=loader_settings.depth_for(took))
    place = loader_settings.place(config.data, ranks)
    distributed.on_first(ranks, lambda: loader_settings.write(place, settings))
    depths = range(2, settings.prefetch + 1)
    return {
        "prefetch": settings.prefetch,
        "hw_decoder_load": settings.hw_decoder_load,
        "waiting_by_prefetch": {depth: loader_settings.waiting(took, depth) for depth in depths},
        "kept": str(place),
    }


def _show(r: dict[str, Any], share: int) -> None:
    def paces(by: dict[float, float]) -> str:
        return ", ".join(f"{setting:g}: {pace:,.0f}" for setting, pace in by.items())

    by_threads = f"images/s {paces(r['images_per_s_by_threads'])}; a setting's own rounds differ by {r['spread']:.0%}"
    if r["kept"] is None:
        why = f"not told apart ({by_threads}): {share}, this rank's share of the cores, stays the default"
        rows = [("data.threads", why), ("kept", "nothing new; run it on a quieter machine, or with more --seconds")]
        terminal.table("not tuned", rows)
        return
    waits = ", ".join(f"{depth}: {share:.1%}" for depth, share in r["waiting_by_prefetch"].items())
    rows = [
        ("data.threads", f"{r['threads']}: the fewest within 3% of the fastest ({by_threads})"),
        ("data.prefetch", f"{r['prefetch']}: the fewest that keep a step's waiting under 1%, or 8 (waiting {waits})"),
    ]
    if r["images_per_s_by_hw_decoder_load"]:
        by_load, load = paces(r["images_per_s_by_hw_decoder_load"]), r["hw_decoder_load"]
        what = (
            f"{HARDWARE_LOAD if load is None else load:g}: the most that keeps up, so the step keeps its GPU and host"
        )
        rows.append(("data.hw_decoder_load", f"{what} (images/s {by_load})"))
    rows.append(("kept in", f"{r['kept']}; training uses it where the config leaves these keys unset"))
    terminal.table("tuned", rows)
