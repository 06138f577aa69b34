"""`fastrot estimate`: a config on machines that are not there, before anyone queues for them."""

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from fastrot import terminal
from fastrot.config import Config
from fastrot.data.build import sides
from fastrot.engine import AUTOCAST
from fastrot.errors import UserError
from fastrot.models.over_ranks import Group
from fastrot.models.resnet import TURNS, build_model
from fastrot.profiling import roofline
from fastrot.profiling.estimate import Demand, Plan, plan
from fastrot.profiling.hardware import Hardware, Known, read
from fastrot.profiling.memory import peak_of_step
from fastrot.runs.arithmetic import arithmetic, refuse_norm_views
from fastrot.runs.build import fitted
from fastrot.runs.elsewhere import profiled
from fastrot.runs.memory import state_bytes

_STOPS = 0.5  # of one GPU's pace: where a training has stopped scaling
_FULL = 0.95  # of a GPU's memory, which a training cannot have
_WHOLE = 3  # plans that are printed whole: of more, a line each


Messages = Callable[[], tuple[int, tuple[int, int]]]


def demand_of(config: Config, ranks: int, rows: int, image_bytes: float, messages: Messages) -> Demand:
    """What one of so many ranks must do for a step of the config, on a data set of `rows` images.

    messages: counts what synchronised norms send each way, and are waited for at best and at worst.
    """
    n = arithmetic(config, ranks, rows)
    dtype = AUTOCAST.get(config.engine.precision, torch.float32)
    side, images = max(sides(config)), -(-n.images // n.ranks)
    with torch.device("meta"):
        model = build_model(config.model.arch, TURNS, config.run.seed)
    fresh = partial(_network, config)
    channels = sum(m.num_features for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    refuse_norm_views(config, n)
    synchronised = n.norm_groups < ranks
    graphs = config.engine.cuda_graphs == "collectives" or (bool(config.engine.cuda_graphs) and not synchronised)
    rows_of_a_step = roofline.step_rows(fresh, images * n.views_per_image, images, side, dtype)
    maps = peak_of_step(fresh(), n.largest * n.views_per_image, config.engine.stem_channels, side, dtype)
    parameters = sum(p.numel() for p in model.parameters())
    sent, waits = messages() if synchronised else (0, (0, 0))
    return Demand(
        images=n.images,
        views=n.images * n.views_per_image,
        steps=n.steps,
        gradient_bytes=4 * parameters,
        norms=sent,
        norm_waits=waits,
        norm_channels=channels,
        bucket_mb=config.engine.bucket_mb,
        image_bytes=image_bytes,
        memory_bytes=maps + state_bytes(config, n, model),
        checkpoint_bytes=3 * 4 * parameters,  # weights, momentum, the backbone
        rows=tuple(rows_of_a_step),
        norm_ranks=ranks // n.norm_groups,
        launches=0 if graphs else sum(row.bytes > 0 for row in rows_of_a_step),
    )


def _network(config: Config, over_ranks: Group | None = None) -> torch.nn.Module:
    return fitted(build_model(config.model.arch, TURNS, config.run.seed), config, over_ranks)


def norm_messages(config: Config) -> tuple[int, tuple[int, int]]:
    """Of maps of any size, between ranks that need not be."""
    synchronised = partial(_network, config, Group("", 2))
    return roofline.norm_messages(roofline.step_rows(synchronised, 2, 1, 32, torch.float32))


def estimate(
    config: Config,
    nodes: list[int],
    gpus: int | None,
    hardware: str,
    rows: int,
    image_kib: float,
    profile: Path | None,
) -> dict[str, Any]:
    """Plans for each number of nodes, printed.

    gpus     a node's; None: the hardware file's.  profile: what `fastrot profile --json` printed of the same network,
    whose step, data path and collectives take the place of the hardware file's.
    Raises UserError where the config cannot run on so many GPUs, or a file is not what it should be.
    """
    machine = read(hardware)
    gpus = gpus or machine.gpus
    found = profiled(profile, config) if profile else None
    machine = found.on(machine) if found else machine

    messages = cache(partial(norm_messages, config))  # the same for any number of ranks

    def demand(ranks: int) -> Demand:
        one = demand_of(config, ranks, rows, image_kib * 1024, messages)
        if found is None:
            return one
        return replace(one, measured=found.step_over_ranks if one.norms else found.step)

    alone, plans, refused = demand(1), [], {}
    for count in nodes:
        try:
            plans.append(plan(demand(count * gpus), alone, machine, count, gpus))
        except UserError as error:
            refused[count] = str(error)
    if not plans:
        raise UserError(refused[nodes[0]])
    marks = _marks(machine, bool(found))
    result = {
        "hardware": machine.model_dump(),
        "profile": found and found.says(machine),
        "sources": marks,
        "images_per_step": alone.images,
        "steps": alone.steps,
        "plans": [asdict(one) | {"says": dict(told(one, machine, marks))} for one in plans],
        "stops_scaling": _stops(plans),
        "refused": refused,
    }
    _show(machine, plans, result)
    return result


def _stops(plans: list[Plan]) -> str:
    """Where, and for what, adding nodes no longer pays; empty where it does to the last."""
    for one in plans:
        if one.efficiency < _STOPS:
            return (
                f"{_nodes(one.nodes)}: {one.efficiency:.0%} of one GPU's pace a GPU; most of a step is {one.step.bound}"
            )
    return ""


def _nodes(count: int) -> str:
    return f"{count:,} node{'s' * (count > 1)}"


def _marks(machine: Hardware, profiled: bool) -> dict[str, str]:
    """By part of a plan, the least sure source of its numbers."""

    def least(*names: str) -> str:
        known = {getattr(machine, name).source for name in names}
        return next(source for source in ("assumed", "data sheet", "measured") if source in known)

    compute = "measured" if profiled else least("matmul_flops", "memory_bytes", "launch_s")
    return {
        "compute": compute,
        "norms": least("link_latency_s", "net_latency_s"),
        "gradients": least("link_bytes", "net_bytes"),
        "data": (
            f"storage {machine.storage_bytes.source}, decoding measured"
            if profiled
            else least("storage_bytes", "core_decode", "gpu_decode")
        ),
        "memory": "counted by a trace of the network",
        "checkpoints": least("storage_bytes", "gpu_hours_to_failure", "restart_s"),
    }


def _show(machine: Hardware, plans: list[Plan], result: dict[str, Any]) -> None:
    known = [(name, getattr(machine, name)) for name in Hardware.model_fields]
    rows = [(name, f"{one.value:.3g} ({one.source}: {one.note})") for name, one in known if isinstance(one, Known)]
    terminal.table(machine.name, [("profile", result["profile"]), *rows] if result["profile"] else rows)
    if len(plans) > 1:
        terminal.table("nodes", [(f"{one.nodes:,}", _in_short(one)) for one in plans])
    for one in plans if len(plans) <= _WHOLE else []:
        title = f"{_nodes(one.nodes)} of {one.gpus} GPU{'s' * (one.gpus > 1)}"
        terminal.table(title, told(one, machine, result["sources"]))
    said = [(_nodes(count), why) for count, why in result["refused"].items()]
    if result["stops_scaling"]:
        said.insert(0, ("stops at", result["stops_scaling"]))
    if said:
        terminal.table("scaling", said)


def _hours(hours: float) -> str:
    return terminal.duration(3600 * hours)


def _in_short(one: Plan) -> str:
    low, middle, high = one.views_per_s
    full = "" if one.memory_share < _FULL else "; more than a GPU's memory"
    return (
        f"{middle:,.0f} views/s ({low:,.0f} to {high:,.0f}), {_hours(one.hours[1])}, {one.gpu_hours:,.0f} GPU-hours, "
        f"{one.efficiency:.0%} of one GPU's pace a GPU; bound by {one.step.bound}{full}"
    )


def told(one: Plan, machine: Hardware, marks: dict[str, str]) -> list[tuple[str, str]]:
    """A plan, row by row; each says where its numbers are from."""
    low, middle, high = one.views_per_s
    step = one.step
    parts = {"compute": step.compute_s, "norms": step.norms_s, "gradients": step.gradients_s, "data": step.data_s}
    of_a_step = " ".join(marks[name] for name in parts)
    least = next(source for source in ("assumed", "data sheet", "measured") if source in of_a_step)
    fits = "" if one.memory_share < _FULL else ": more than there is, set engine.images_per_micro_step"
    enough = "can" if one.cores_to_decode <= machine.cores else "cannot alone"
    return [
        (
            "views/s",
            f"{middle:,.0f} ({low:,.0f} to {high:,.0f}); {one.efficiency:.0%} of one GPU's pace a GPU [{least}]",
        ),
        (
            "a step",
            f"{step.seconds * 1e3:.1f} ms: {', '.join(f'{k} {v * 1e3:.1f} [{marks[k]}]' for k, v in parts.items())}",
        ),
        ("bound by", step.bound),
        (
            "time",
            f"{_hours(one.hours[1])} ({_hours(one.hours[2])} to {_hours(one.hours[0])}) once it runs, "
            f"{one.gpu_hours:,.0f} GPU-hours [{least}]",
        ),
        (
            "a node reads",
            f"{one.images_per_s_a_node:,.0f} images/s, {one.bytes_per_s_a_node / 2**20:,.0f} MiB/s; its {machine.cores} "
            f"cores {enough} decode them, which takes {one.cores_to_decode:.0f} [{machine.core_decode.source}]",
        ),
        ("GPU memory", f"{one.memory_share:.0%} of {machine.gpu_memory_gib:g} GiB{fits} [{marks['memory']}]"),
        (
            "checkpoints",
            f"{one.checkpoint_s:.2f} s each, best every {terminal.duration(one.checkpoint_every_s)}; "
            f"{one.goodput:.1%} of the time is training that stays [{marks['checkpoints']}, by simulation]",
        ),
    ]
