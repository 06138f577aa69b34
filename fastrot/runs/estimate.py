"""`fastrot estimate`: a config on machines that are not there, before anyone queues for them."""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastrot import terminal
from fastrot.config import Config
from fastrot.data.build import sides
from fastrot.engine import AUTOCAST
from fastrot.errors import UserError
from fastrot.files import read_json
from fastrot.models.resnet import TURNS, build_model
from fastrot.profiling import roofline
from fastrot.profiling.estimate import Demand, Plan, measured, plan
from fastrot.profiling.hardware import Hardware, Known, read
from fastrot.profiling.memory import peak_of_step
from fastrot.runs.arithmetic import arithmetic, refuse_norm_views
from fastrot.runs.build import fitted
from fastrot.runs.memory import state_bytes

_STOPS = 0.5  # of one GPU's pace: where a training has stopped scaling


def demand_of(config: Config, ranks: int, rows: int, image_bytes: float) -> Demand:
    """What one of so many ranks must do for a step of the config, on a data set of `rows` images."""
    n = arithmetic(config, ranks, rows)
    dtype = AUTOCAST.get(config.engine.precision, torch.float32)
    side, images = max(sides(config)), -(-n.images // n.ranks)
    with torch.device("meta"):
        model = build_model(config.model.arch, TURNS, config.run.seed)
    fresh = partial(_network, config)
    channels = [m.num_features for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    refuse_norm_views(config, n)
    synchronised = n.norm_groups < ranks
    maps = peak_of_step(fresh(), n.largest * n.views_per_image, config.engine.stem_channels, side, dtype)
    parameters = sum(p.numel() for p in model.parameters())
    return Demand(
        images=n.images,
        views=n.images * n.views_per_image,
        steps=n.steps,
        gradient_bytes=4 * parameters,
        norms=len(channels) if synchronised else 0,
        norm_channels=sum(channels),
        bucket_mb=config.engine.bucket_mb,
        image_bytes=image_bytes,
        memory_bytes=maps + state_bytes(config, n, model),
        checkpoint_bytes=3 * 4 * parameters,  # weights, momentum, the backbone
        rows=tuple(roofline.step_rows(fresh, images * n.views_per_image, images, side, dtype)),
    )


def _network(config: Config) -> torch.nn.Module:
    return fitted(build_model(config.model.arch, TURNS, config.run.seed), config, over_ranks=None)


def estimate(
    config: Config,
    nodes: list[int],
    gpus: int | None,
    hardware: str,
    rows: int,
    image_kib: float,
    profile: Path | None,
) -> dict[str, Any]:
    """Plans for each number of nodes, printed as a table.

    gpus     a node's; None: the hardware file's.  profile: what `fastrot profile --json` printed of one process of
    the same network, whose step takes the place of the roofline.
    Raises UserError where the config cannot run on so many GPUs, or a file is not what it should be.
    """
    machine = read(hardware)
    gpus = gpus or machine.gpus
    step_s, images = _from(profile) if profile else (None, 0.0)

    def demand(ranks: int) -> Demand:
        found = demand_of(config, ranks, rows, image_kib * 1024)
        return measured(found, step_s, images * ranks) if step_s else found

    alone, plans, refused = demand(1), [], {}
    for count in nodes:
        try:
            plans.append(plan(demand(count * gpus), alone, machine, count, gpus))
        except UserError as error:
            refused[count] = str(error)
    if not plans:
        raise UserError(refused[nodes[0]])
    _show(machine, plans, refused, profile)
    return {
        "hardware": machine.model_dump(),
        "step": "measured" if step_s else "roofline of the hardware file's numbers",
        "images_per_step": alone.images,
        "steps": alone.steps,
        "plans": [asdict(one) for one in plans],
        "stops_scaling": _stops(plans),
        "refused": refused,
    }


def _from(path: Path) -> tuple[float, float]:
    """(seconds of a step alone, its images) of a profile of one process."""
    try:
        found = read_json(path, dict[str, Any])
        step_s = float(found["parts_of_a_step"]["step"]["step_s"])
        return step_s, float(found["stages"]["step"]["pace"]) * step_s
    except (OSError, ValueError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"--from {path}: not what fastrot profile --json prints ({error})") from None


def _stops(plans: list[Plan]) -> str:
    """Where, and for what, adding nodes no longer pays; empty where it does to the last."""
    for one in plans:
        if one.efficiency < _STOPS:
            return (
                f"{one.nodes} nodes: {one.efficiency:.0%} of one GPU's pace a GPU; most of a step is {one.step.bound}"
            )
    return ""


def _show(machine: Hardware, plans: list[Plan], refused: dict[int, str], profile: Path | None) -> None:
    known = [(name, getattr(machine, name)) for name in Hardware.model_fields]
    rows = [(name, f"{one.value:.3g} ({one.source}: {one.note})") for name, one in known if isinstance(one, Known)]
    terminal.table(machine.name, [("a step alone", f"measured: {profile}"), *rows] if profile else rows)
    for one in plans:
        low, middle, high = one.views_per_s
        step = one.step
        parts = {"compute": step.compute_s, "norms": step.norms_s, "gradients": step.gradients_s, "data": step.data_s}
        terminal.table(
            f"{one.nodes} nodes of {one.gpus} GPUs",
            [
                ("views/s", f"{middle:,.0f} ({low:,.0f} to {high:,.0f}); {one.efficiency:.0%} of one GPU's pace a GPU"),
                ("a step", f"{step.seconds * 1e3:.1f} ms: {', '.join(f'{k} {v * 1e3:.1f}' for k, v in parts.items())}"),
                ("bound by", step.bound),
                (
                    "hours",
                    f"{one.hours[1]:.1f} ({one.hours[2]:.1f} to {one.hours[0]:.1f}), {one.gpu_hours:,.0f} GPU-hours",
                ),
                (
                    "a node reads",
                    f"{one.images_per_s_a_node:,.0f} images/s, {one.bytes_per_s_a_node / 2**20:,.0f} MiB/s; "
                    f"{one.cores_to_decode:.0f} of its {machine.cores} cores would decode them",
                ),
                ("GPU memory", f"{one.memory_share:.0%} of {machine.gpu_memory_gib:g} GiB"),
                (
                    "checkpoints",
                    f"{one.checkpoint_s:.2f} s each, best every {terminal.duration(one.checkpoint_every_s)}; "
                    f"{one.goodput:.1%} of the time is training that stays",
                ),
            ],
        )
    told = [(f"{count} nodes", why) for count, why in refused.items()]
    if stops := _stops(plans):
        told.insert(0, ("stops at", stops))
    if told:
        terminal.table("scaling", told)
