"""`fastrot profile`: each stage of a training by itself, what bounds it, what a cure would give, and whether it did."""

import math
import statistics
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from fastrot import distributed, machine, terminal
from fastrot.config import Config, flat, from_values
from fastrot.data.build import crop_at, decoder_of, open_manifest, plan_of, settings_of
from fastrot.data.loader_settings import interval, thread_counts, waiting
from fastrot.data.manifest import Manifest
from fastrot.data.remarks import describe
from fastrot.distributed import Ranks
from fastrot.errors import UserError
from fastrot.profiling.kernels import IDLE
from fastrot.profiling.pace import SLOW_RANK
from fastrot.profiling.stages import decoding, handing_over, held_bytes, held_pixels, reading
from fastrot.profiling.verdict import NAMES, SEEN, Ceiling, Interval, Stages, Verdict, held, in_words, judge, ratio
from fastrot.runs.arithmetic import arithmetic
from fastrot.runs.build import Job, set_torch_flags
from fastrot.runs.elsewhere import for_elsewhere
from fastrot.runs.subject import Extracting, Parts, Subject, Training

_SHARES = {
    "cold": 1,
    "warm": 1,
    "decode": 2,
    "resample": 1,
    "hand-over": 1,
    "data": 3,
    "step": 4,
    "both": 4,
    "cures": 8,
}  # of the seconds
_NO_SETTING = ("cold", "warm", "reads", "between", "ahead")  # stages that no setting makes faster
_DRAWS = 20  # orders of the batches in which a depth is simulated


@dataclass(frozen=True)
class Cure:
    """A setting, the pace it is predicted to give over the present one, and what it gave where it was tried."""

    setting: str
    predicted: Interval
    achieved: Interval | None = None


@dataclass(frozen=True)
class Profiled:
    """What is profiled. make: a job of its command, as Job is called, None for `fastrot features`; choose: its images
    of all; crops: whether decoders cut its images for the loader, or its own threads."""

    make: Callable[..., Job] | None = Job
    choose: Callable[[Manifest], Manifest] | None = None
    crops: bool = True


@dataclass(frozen=True)
class _Bench:
    """One config's training, and how long a unit of time is."""

    what: Profiled
    config: Config
    ranks: Ranks
    manifest: Manifest
    unit: float

    @property
    def subject(self) -> Subject:
        where = self.config, self.ranks, self.manifest
        return Training(self.what.make, *where) if self.what.make else Extracting(*where)

    def with_setting(self, setting: str) -> "_Bench":
        key, _, value = setting.partition("=")
        return replace(self, config=from_values(None, flat(self.config) | {key: value}))


def profile(
    config: Config, ranks: Ranks, seconds: float, attempt: bool, trace: Path | None, what: Profiled
) -> dict[str, Any]:
    """Measure every stage, judge, propose; with `attempt` train with each proposal and say what it gave.

    seconds  of timing in all, about; setting up, warming up and compiling come on top.
    Raises UserError where there are no seconds.
    """
    if not 0 < seconds < math.inf:
        raise UserError(f"--seconds {seconds:g}: must be above 0")
    set_torch_flags(config)
    manifest = open_manifest(config.data.train, config, ranks, "data.train")
    manifest = what.choose(manifest) if what.choose else manifest
    if ranks.first:
        describe(manifest, terminal.console().print)
    bench = _Bench(what, config, ranks, manifest, seconds / sum(_SHARES.values()))
    mine, parts, seen = _measured(bench, trace)
    stages, took = distributed.on_first(ranks, lambda: (mine, seen))  # all ranks judge and try the same
    deeper = _deeper(bench, stages, took)
    stages = replace(stages, deeper=max((cure.predicted[1] for cure in deeper), default=1.0))
    verdict = judge(stages)
    slow = _slow_rank(ranks, parts["both"])
    if slow:
        verdict = replace(verdict, bound="rank", stage="rank", gain=slow["gain"])
    found = [] if slow else _cures(bench, stages, verdict, deeper)
    cures = distributed.on_first(ranks, lambda: found)
    if attempt:
        cures = [_tried(bench, cure) for cure in cures]
    alone = bench.subject
    result = {
        "stages": {
            name: asdict(one) | {"pace": one.pace, "cpu_s": one.cpu_s} for name, one in _by_name(stages).items()
        },
        "cores": stages.cores,
        "ranks": ranks.world,
        "views_per_image": arithmetic(config, ranks.world, len(manifest)).views_per_image,
        "images_per_step": config.optim.images_per_step,
        "parts_of_a_step": parts,
        "roofline": alone.layers() if isinstance(alone, Training) else {},
        "verdict": asdict(verdict),
        "says": _slow_says(slow) if slow else in_words(stages, verdict, "images"),
        "cures": [asdict(cure) for cure in cures],
        "slow_rank": slow,
        "elsewhere": for_elsewhere(config, ranks, manifest, seconds) if what.make is Job else None,
    }
    if ranks.first:
        _show(result, cures)
    return result


def _by_name(stages: Stages) -> dict[str, Ceiling]:
    return {**stages.path, "data": stages.data, "step": stages.step, "both": stages.both}


def _measured(bench: _Bench, trace: Path | None) -> tuple[Stages, dict[str, Parts], list[float]]:
    """The stages; what a step is made of, alone and in training; the seconds that each batch took the data path."""
    subject, unit, ranks = bench.subject, bench.unit, bench.ranks
    parts: dict[str, Parts] = {}

    def trained(name: str, found: tuple[Ceiling, Parts]) -> Ceiling:
        parts[name] = found[1]
        return found[0]

    with closing(_Path(bench)) as path:
        works: dict[str, Callable[[float], Ceiling]] = {
            **path.works(),
            "data": subject.data,
            "step": lambda seconds: trained("step", subject.step(seconds)),
            "both": lambda seconds: trained("both", subject.both(seconds, trace)),
        }
        shown = terminal.track(works.items(), len(works), "stages") if ranks.first else works.items()
        found = {name: work(_SHARES[name] * unit) for name, work in shown}
    data, step, both = (found.pop(name) for name in ("data", "step", "both"))
    apart = parts["step"]["host_share"]
    cores = machine.cores() / ranks.local_world
    return Stages(cores, data, step, both, parts["both"]["wait_share"], apart, path=found), parts, subject.took


class _Path:
    """The parts of a data path by themselves."""

    def __init__(self, bench: _Bench):
        config, manifest, ranks = bench.config, bench.manifest, bench.ranks
        self._bench, self._plan, self._settings = bench, plan_of(config, manifest), settings_of(config, ranks)
        self._images = min(arithmetic(config, ranks.world, len(manifest)).largest, len(manifest))
        self._decoder = (
            decoder_of(config, manifest, ranks, self._images, self._settings)[0] if bench.what.crops else None
        )

    def works(self) -> dict[str, Callable[[float], Ceiling]]:
        """Name -> seconds -> its ceiling."""
        bench, manifest, plan, images = self._bench, self._bench.manifest, self._plan, self._images
        out: dict[str, Callable[[float], Ceiling]] = {
            "cold": lambda seconds: reading(manifest, plan, images, seconds, cold=True),
            "warm": lambda seconds: reading(manifest, plan, images, seconds, cold=False),
        }
        if decoder := self._decoder:
            size, device = crop_at(bench.config, 0), bench.ranks.device
            depth = self._settings.prefetch
            out |= {
                "decode": lambda seconds: decoding(held_bytes(manifest, plan, images, size), decoder, seconds),
                "resample": lambda seconds: decoding(held_pixels(manifest, plan, images, size), decoder, seconds),
                "hand-over": lambda seconds: handing_over(manifest, plan, images, size, device, depth, seconds),
            }
        return out

    def close(self) -> None:
        if self._decoder:
            self._decoder.close()


def _cures(bench: _Bench, stages: Stages, verdict: Verdict, deeper: list[Cure]) -> list[Cure]:
    """Settings that change what bounds the training, each measured alone; the best three that gain at all."""
    step = verdict.stage == "step"
    candidates = [] if verdict.stage in _NO_SETTING else _of_the_step(bench) if step else _of_the_data_path(bench)
    shorter = replace(bench, unit=bench.unit * _SHARES["cures"] / max(1, len(candidates)))
    shown = terminal.track(candidates, len(candidates), "settings") if bench.ranks.first else candidates
    cures = list(deeper) if verdict.bound == "ahead" else []
    for setting in shown:
        try:
            other = shorter.with_setting(setting)
            new = other.subject.step(other.unit)[0] if step else other.subject.data(other.unit)
        except UserError:  # what cannot run here is no proposal
            continue
        cures.append(Cure(setting, stages.gain(replace(stages, step=new) if step else replace(stages, data=new))))
    better = [cure for cure in cures if cure.predicted[1] > SEEN]
    return sorted(better, key=lambda cure: -cure.predicted[1])[:3]


def _of_the_data_path(bench: _Bench) -> list[str]:
    config, now = bench.config, settings_of(bench.config, bench.ranks)
    out = [f"data.threads={n}" for n in thread_counts(bench.ranks.cores) if n > now.threads]
    if config.data.decode in ("auto", "turbo") and bench.ranks.device.type == "cpu" and bench.what.crops:
        out.append("data.decode=turbo_fast")
    return out


def _deeper(bench: _Bench, stages: Stages, took: list[float]) -> list[Cure]:
    """More batches ahead, simulated with the batches' own times, as often drawn anew."""
    now, rng = settings_of(bench.config, bench.ranks).prefetch, np.random.default_rng(0)
    micro_s = stages.data.pace * statistics.fmean(took) / stages.step.pace  # a micro-step's
    orders = [rng.permutation(took).tolist() for _ in range(_DRAWS)]

    def pace(seconds: list[float], depth: int) -> float:
        return 1 - waiting(seconds, depth + 1, micro_s)  # one is in the loader's hand

    return [
        Cure(f"data.prefetch={n}", interval([pace(order, n) / pace(order, now) for order in orders]))
        for n in sorted({2 * now, 4 * now, 8})
        if n > now
    ]


def _of_the_step(bench: _Bench) -> list[str]:
    engine, on_gpu = bench.config.engine, bench.ranks.device.type == "cuda"
    other = "bf16" if engine.precision == "fp32" else "fp32"
    out = [f"engine.precision={other}"]
    if not engine.channels_last:
        out.append("engine.channels_last=true")
    if on_gpu and bench.what.make is Job:
        out += [f"engine.norm={norm}" for norm in ("fused", "fused_conv", "fused_chain") if norm != engine.norm]
        out += ["engine.cuda_graphs=auto"] if not engine.cuda_graphs else []
    return out


def _tried(bench: _Bench, cure: Cure) -> Cure:
    """Trained with it and without, in turns."""
    other, seconds = bench.with_setting(cure.setting), _SHARES["both"] * bench.unit
    now: list[float] = []
    new: list[float] = []
    for _ in range(2):
        now += bench.subject.both(seconds)[0].paces
        new += other.subject.both(seconds)[0].paces
    return replace(cure, achieved=ratio(new, now))


def _slow_rank(ranks: Ranks, both: Parts) -> dict[str, Any] | None:
    """A rank whose own work takes much longer than the others': they wait for it in communication."""
    if ranks.world == 1 or "laps" not in both:  # nobody waits for another
        return None
    mine = {
        name.removesuffix("_share"): [share * step for share, step in zip(shares, both["laps"]["step_s"], strict=True)]
        for name, shares in both["laps"].items()
        if name.endswith("_share") and name != "communicate_share"
    }
    step_s, everyone = both["laps"]["step_s"], list[Any]([None] * ranks.world)
    dist.all_gather_object(everyone, mine)
    own = [[sum(lap) for lap in zip(*one.values(), strict=True)] for one in everyone]
    means = [statistics.fmean(laps) for laps in own]
    ordered = sorted(range(ranks.world), key=lambda rank: means[rank])
    middle, worst = ordered[(ranks.world - 1) // 2], ordered[-1]
    if means[worst] < SLOW_RANK * means[middle]:
        return None
    gains = [step / (step - slow + usual) for step, slow, usual in zip(step_s, own[worst], own[middle], strict=True)]
    later = {name: statistics.fmean(everyone[worst][name]) - statistics.fmean(everyone[middle][name]) for name in mine}
    return {
        "rank": worst,
        "host": ranks.peers[worst].host if ranks.peers else "",
        "times_the_median": means[worst] / means[middle],
        "stage": max(later, key=lambda name: later[name]),
        "gain": interval(gains),
    }


def _slow_says(slow: dict[str, Any]) -> str:
    low, middle, high = slow["gain"]
    return (
        f"bound by rank {slow['rank']} on {slow['host']}: its own work takes {slow['times_the_median']:.1f} times the "
        f"median's, most of what it takes longer in {slow['stage']}; the others wait for it. Were it as fast, "
        f"{middle:.2f} times the pace ({low:.2f} to {high:.2f})"
    )


def _show(result: dict[str, Any], cures: list[Cure]) -> None:
    rows = [(NAMES.get(name, "training, both together"), _row(one, result)) for name, one in result["stages"].items()]
    for name, title in (("step", "a step alone"), ("both", "a step in training")):
        part = result["parts_of_a_step"][name]
        shares = {key.removesuffix("_share"): part[key] for key in part if key.endswith("_share")}
        if "forward" in shares:
            del shares["compute"]
        told = ", ".join(f"{key} {share:.0%}" for key, share in shares.items() if share >= 0.005)
        rows.append((title, f"{part['step_s']:.3f} s: {told}; {part['memory_gib']:.1f} GiB"))
    if gpu := result["parts_of_a_step"]["both"].get("gpu"):
        kinds = ", ".join(f"{name} {share:.0%}" for name, share in gpu.items() if name != IDLE)
        rows.append(("the GPU in training", f"{1 - gpu[IDLE]:.0%} busy: {kinds}"))
    terminal.table("alone, each, of a rank" if result["ranks"] > 1 else "alone, each", rows)
    if roof := result["roofline"]:
        title = f"the roof: {roof['flops'] / 1e9:,.0f} GFLOP/s, {roof['bytes'] / 2**30:,.1f} GiB/s"
        terminal.table(title, [(one["name"], _beside_the_roof(one)) for one in roof["groups"]])
    tried = [("try", _told(cure)) for cure in cures]
    if not cures and not result["slow_rank"]:
        tried.append(("try", "none of the settings tried alone would gain 3%"))
    terminal.table("verdict", [("bound", result["says"]), *tried])


def _row(one: dict[str, Any], result: dict[str, Any]) -> str:
    pace, more = one["pace"], one["more"]
    said = [
        f"{pace:,.0f} images/s ({min(one['paces']):,.0f} to {max(one['paces']):,.0f})",
        f"{pace * result['views_per_image']:,.0f} views/s",
        f"{pace * one['cpu_s']:.1f} cores",
    ]
    if more:
        said.append(f"{pace * more['bytes'] / 2**20:,.1f} MiB/s, {pace * more['opens']:,.0f} files opened/s")
    return ", ".join(said)


def _beside_the_roof(group: dict[str, Any]) -> str:
    share, ms = group["least_s"] / group["seconds"], 1e3 * group["seconds"]
    return f"{share:.0%} of the roof: {ms:.1f} ms, {group['flops'] / 1e9:.2f} GFLOP, {group['bytes'] / 2**20:,.0f} MiB"


def _told(cure: Cure) -> str:
    low, middle, high = cure.predicted
    line = f"{cure.setting}: {middle:.2f} times the pace predicted ({low:.2f} to {high:.2f})"
    if cure.achieved is None:
        return line
    low, middle, high = cure.achieved
    judged = "as predicted" if held(cure.predicted, cure.achieved) else "the prediction failed"
    return f"{line}; {middle:.2f} achieved ({low:.2f} to {high:.2f}): {judged}"
