"""What a profile keeps for machines that are not there: the step at two sizes, collectives, and where it was made."""

import itertools
import statistics
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastrot import machine
from fastrot.config import Config, flat, from_values
from fastrot.data.manifest import Manifest
from fastrot.distributed import Ranks
from fastrot.engine.graphs import WARM_UPS
from fastrot.errors import UserError
from fastrot.files import read_json
from fastrot.models.over_ranks import Group
from fastrot.models.sync_batchnorm import synchronise_batchnorm
from fastrot.profiling.collectives import Fit, Timing, fit, sweep
from fastrot.profiling.estimate import Measured
from fastrot.profiling.hardware import Hardware, Known
from fastrot.runs.build import Job
from fastrot.runs.subject import again_and_again, run_laps

LEAST_S = 20.0  # of a profile that has time for this
_LAPS = 7
_FEWER = 4  # times: the second size of a step


@dataclass(frozen=True)
class _Size:
    """A step of a rank's `images`: seconds without communication, with the quartiles of its laps, and of its cores."""

    images: float
    seconds: float
    low: float
    high: float
    cpu_s: float


def for_elsewhere(config: Config, ranks: Ranks, manifest: Manifest, seconds: float) -> dict[str, Any]:
    """What `fastrot estimate --from` reads besides a profile's stages; collective. seconds: of the profile."""
    found: dict[str, Any] = {"machine": _machine(ranks), "network": network_of(config)}
    if seconds < LEAST_S:
        return found
    images = config.optim.images_per_step
    sizes = sorted({images, max(ranks.world, images // _FEWER)}, reverse=True)
    for name, synced in (("steps", False), ("steps_over_ranks", True)):
        found[name] = [asdict(_step(config, ranks, manifest, size, seconds / 20, synced)) for size in sizes]
    return found | sweep(ranks.device)


def network_of(config: Config) -> dict[str, Any]:
    """What must be the same where a profile is taken for a config's."""
    values = flat(config)
    keys = ("model.arch", "data.crop", "rotation.views", "engine.precision", "engine.norm", "engine.recompute")
    return {key: values[key] for key in keys}


def _machine(ranks: Ranks) -> dict[str, Any]:
    on_gpu = ranks.device.type == "cuda"
    name = torch.cuda.get_device_name(ranks.device) if on_gpu else machine.processor()
    return {"device": name, "cores": machine.cores(), "ranks": ranks.world, "cores_a_rank": ranks.cores}


def _step(config: Config, ranks: Ranks, manifest: Manifest, images: int, seconds: float, synced: bool) -> _Size:
    """Laps of the step on a resident batch. synced: one process computes synchronised norms as several do, which takes
    more passes over the maps."""
    config = from_values(None, flat(config) | {"optim.images_per_step": images})
    job = Job(config, ranks, manifest, None, None, None, lambda line: None)
    try:
        with closing(job.batches(range(1), 0)) as batches:
            resident = again_and_again(job, next(batches))
        if synced and dist.group.WORLD:
            synchronise_batchnorm(job.engine.model, Group(dist.group.WORLD.group_name, ranks.world))
        warm = run_laps(job, resident, WARM_UPS + 2, 1)
        wanted = torch.tensor(round(seconds / _LAPS / min(line["step_s"] for line in warm.lines)), device=ranks.device)
        lap = max(1, int(job.engine.reduce(wanted, greatest=True)))  # the ranks must agree
        laps = run_laps(job, resident, lap * (_LAPS + 1), lap)
    finally:
        job.close()
    own = [line["step_s"] * (1 - line["communicate_share"]) for line in laps.lines[1:]]
    cpu = [(after - before) / lap for before, after in itertools.pairwise(laps.cpu)]
    low, median, high = statistics.quantiles(own, n=4)
    return _Size(images / ranks.world, median, low, high, statistics.median(cpu))


@dataclass(frozen=True)
class Profile:
    """A profile as `fastrot estimate` reads it."""

    path: Path
    device: str
    cores: int
    step: Measured
    step_over_ranks: Measured
    collectives: Fit | None

    def on(self, hardware: Hardware) -> Hardware:
        """With what was measured in place of the file's numbers: the data path's rate and, within a node, collectives."""
        rate = 1 / self.step.data_s
        measured = {"core_decode": Known(value=rate, low=rate, high=rate, source="measured", note=str(self.path))}
        if fit := self.collectives:
            for name, (low, value, high) in (("link_latency_s", fit.latency_s), ("link_bytes", fit.rate)):
                note = f"{fit.ranks} ranks: {self.path}"
                measured[name] = Known(value=value, low=low, high=high, source="measured", note=note)
        return hardware.model_copy(update=measured)

    def says(self, hardware: Hardware) -> str:
        """Where it was made."""
        other = hardware.device and hardware.device not in self.device
        return f"{self.path}: of {self.device}, {self.cores} cores" + (
            f"; another machine than {hardware.name}: its step is taken as if it were that one's" if other else ""
        )


def profiled(path: Path, config: Config) -> Profile:
    """Raises UserError where it is no profile, of another network, or too short to hold what is asked of it."""
    try:
        found = read_json(path, dict[str, Any])
        made, data, both = found["elsewhere"], found["stages"]["data"], found["stages"]["both"]
        paces, training = sorted(map(float, both["paces"])), found["parts_of_a_step"]["both"]
        in_training = training["step_s"] * (1 - training["wait_share"] - training["communicate_share"])
        network, device, cores = made["network"], made["machine"]["device"], int(made["machine"]["cores"])
        steps, over_ranks = ([_Size(**one) for one in made.get(name, [])] for name in ("steps", "steps_over_ranks"))
        timings = [Timing(**one) for one in made.get("collectives", [])]
        crowding = float(made.get("crowding", 1.0))
        data_s, decode = float(data["cpu_s"]), float(data["pace"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--from {path}: not what fastrot profile --json prints ({error})") from None
    other = [f"{key}={value}" for key, value in network.items() if network_of(config).get(key) != value]
    if other:
        raise UserError(f"--from {path}: a profile of {', '.join(other)}; profile this config")
    if min(len(steps), len(over_ranks)) < 2:
        raise UserError(f"--from {path}: holds no step at two sizes; profile for {LEAST_S:g} s or more")
    sweep_of = fit(timings) if timings else None
    busy = sweep_of.cpu_share if sweep_of else 0.0
    # with the data path at work, which takes of the memory's bandwidth
    beside = in_training / steps[0].seconds
    spread = statistics.median(paces) / paces[-1], statistics.median(paces) / paces[0]

    def step(many: _Size, few: _Size) -> Measured:
        image_s, host_image_s = (
            max(0.0, (a - b) / (many.images - few.images))
            for a, b in ((many.seconds, few.seconds), (many.cpu_s, few.cpu_s))
        )
        fixed_s, host_fixed_s = (
            max(0.0, all_of - part * many.images)
            for all_of, part in ((many.seconds, image_s), (many.cpu_s, host_image_s))
        )
        alone = beside * fixed_s, beside * image_s
        return Measured(*alone, spread, host_fixed_s, host_image_s, data_s, decode, busy, crowding)

    return Profile(path, device, cores, step(*steps), step(*over_ranks), sweep_of)
