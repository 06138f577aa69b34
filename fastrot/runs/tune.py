"""`fastrot tune`: how many threads, how far ahead, and how much for the hardware decoder, here and for this data."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch.distributed as dist

from fastrot import distributed, machine, terminal
from fastrot.config import Config
from fastrot.data import loader_settings
from fastrot.data.build import crop_at, describe, make_loader, open_manifest, settings_of
from fastrot.data.loader_settings import Tuned
from fastrot.data.manifest import Manifest
from fastrot.distributed import Ranks
from fastrot.errors import UserError
from fastrot.runs.arithmetic import arithmetic

_WARM = 3  # batches before the clock starts
_LEAST = 8  # batches timed, however slow
_ROUNDS = 3  # alternating, so that a busy moment hits no setting alone
_MOST_STEPS = 10**6
_SHARES = (0.0, 0.25, 0.5, 0.65, 0.8, 1.0)  # of the hardware decoder


@dataclass(frozen=True)
class _Bench:
    config: Config
    manifest: Manifest
    ranks: Ranks
    seconds: float

    def run(self, settings: list[Tuned], title: str) -> list[tuple[float, list[float]]]:
        """Of each: images/s of all ranks, median of the rounds; and the seconds of every batch."""
        laps: list[list] = [[] for _ in settings]
        turns = [(at, one) for _ in range(_ROUNDS) for at, one in enumerate(settings)]
        for at, one in terminal.track(turns, len(turns), title) if self.ranks.first else turns:
            laps[at].append(self._lap(one))
        return [(statistics.median(pace for pace, _ in of), [s for _, took in of for s in took]) for of in laps]

    def _lap(self, settings: Tuned) -> tuple[float, list[float]]:
        mine = list(self._intervals(settings))
        all_ranks: list = [None] * self.ranks.world
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


def tune(config: Config, ranks: Ranks, seconds: float) -> dict:
    """Run the loader for `seconds` at each of some settings, choose, and keep the choice in the cache.

    To be started as the training will be: the ranks of a machine share its cores, and run together here.
    """
    if seconds <= 0:
        raise UserError(f"--seconds {seconds:g}: must be above 0")
    manifest = open_manifest(config.data.train, config, ranks, "data.train")
    describe(manifest, terminal.console().print if ranks.first else lambda line: None)
    bench = _Bench(config, manifest, ranks, seconds / _ROUNDS)
    settings = replace(settings_of(config, ranks), found=f"by fastrot tune, {time.strftime('%Y-%m-%d')}")

    tried = [replace(settings, threads=n) for n in loader_settings.thread_counts(machine.cores() // ranks.local_world)]
    laps = bench.run(tried, "threads")
    by_threads = {one.threads: pace for one, (pace, _) in zip(tried, laps, strict=True)}
    settings = replace(settings, threads=loader_settings.cheapest(by_threads))
    pace, took = laps[tried.index(settings)]
    by_load = {}
    if ranks.device.type == "cuda" and config.data.decode in ("auto", "dali") and config.data.decode_on != "cpu":
        tried = [replace(settings, hw_decoder_load=load) for load in _SHARES]
        laps = bench.run(tried, "share of the hardware decoder")
        by_load = {one.hw_decoder_load: pace for one, (pace, _) in zip(tried, laps, strict=True)}
        settings = replace(settings, hw_decoder_load=max(by_load, key=by_load.get))
        pace, took = laps[tried.index(settings)]
    settings = replace(settings, prefetch=loader_settings.depth_for(took))
    kept = loader_settings.place(config.data, ranks)
    distributed.on_first(ranks, lambda: loader_settings.write(kept, settings))
    result = {
        "threads": settings.threads,
        "prefetch": settings.prefetch,
        "hw_decoder_load": settings.hw_decoder_load,
        "images_per_s": pace,
        "images_per_s_by_threads": by_threads,
        "images_per_s_by_hw_decoder_load": by_load,
        "waiting_by_prefetch": {
            depth: loader_settings.waiting(took, depth) for depth in range(2, settings.prefetch + 1)
        },
        "kept": str(kept),
    }
    if ranks.first:
        _show(result)
    return result


def _show(r: dict) -> None:
    def paces(by: dict[float, float]) -> str:
        return ", ".join(f"{setting:g}: {pace:,.0f}" for setting, pace in by.items())

    waits = ", ".join(f"{depth}: {share:.1%}" for depth, share in r["waiting_by_prefetch"].items())
    rows = [
        (
            "data.threads",
            f"{r['threads']}: the fewest within 3% of the fastest (images/s {paces(r['images_per_s_by_threads'])})",
        ),
        ("data.prefetch", f"{r['prefetch']}: the fewest that keep a step's waiting under 1%, or 8 (waiting {waits})"),
    ]
    if r["images_per_s_by_hw_decoder_load"]:
        by_load = paces(r["images_per_s_by_hw_decoder_load"])
        rows.append(("data.hw_decoder_load", f"{r['hw_decoder_load']:g}: the fastest (images/s {by_load})"))
    rows.append(("kept in", f"{r['kept']}; training uses it where the config leaves these keys unset"))
    terminal.table("tuned", rows)
