"""--dry-run: say what a run would be, then run a few of its steps where they fit."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from fastrot import terminal
from fastrot.config import Config, table
from fastrot.data.build import open_manifest
from fastrot.data.manifest import Manifest
from fastrot.data.remarks import describe
from fastrot.distributed import Ranks
from fastrot.engine.graphs import WARM_UPS
from fastrot.runs.arithmetic import RECIPE_VIEWS, uses_graphs
from fastrot.runs.build import Job, set_torch_flags
from fastrot.runs.loop import run
from fastrot.runs.memory import GIB, Memory, running_out_is_a_fault

_TIMED = 2  # steps after those that warm up, with the loader running ahead


class _Last:
    """In place of a run's log: keeps the last line."""

    def tick(self) -> None: ...

    def write(self, values: dict[str, Any]) -> None:
        self.values = values


def dry_run(
    config: Config,
    sources: dict[str, str],
    ranks: Ranks,
    deepspeed_config: str | None,
    make_job: Callable[..., Job] = Job,
    choose: Callable[[Manifest], Manifest] | None = None,
) -> dict[str, Any]:
    """Print the plan within seconds, then time two steps after those that warm up; writes nothing but the named caches.

    sources   of each config value: the file, the command line, a default.
    make_job  Job, or one that learns another thing; choose: which of the training images to learn from.
    Returns what --json prints; without the measured figures where the steps would not fit.
    """
    set_torch_flags(config)
    say: Callable[[str], None] = (
        partial(terminal.console().print, soft_wrap=True, markup=False) if ranks.first else lambda line: None
    )
    if ranks.first:
        terminal.table("config", table(config, sources))
    train = open_manifest(config.data.train, config, ranks, "data.train")
    train = choose(train) if choose else train
    val = open_manifest(config.data.val, config, ranks, "data.val") if config.data.val else None
    for manifest in filter(None, (train, val)):
        describe(manifest, say)
    job = make_job(config, ranks, train, val, None, deepspeed_config, say)
    plan = _plan(job)
    if ranks.first:
        _show_plan(config, plan, job.memory)
    if not job.memory.enough:
        say("no step is measured: it would not fit")
        return plan
    result = plan | _measured(job)
    if ranks.first:
        _show_measured(result)
    return result


def _plan(job: Job) -> dict[str, Any]:
    """What can be said before anything large is made."""
    n, memory = job.numbers, job.memory
    return {
        "images_per_step": n.images,
        "views_per_step": n.images * n.views_per_image,
        "ranks": n.ranks,
        "micro_steps": n.micro_steps,
        "largest_share_images": n.largest,
        "batch_norm_views": n.norm_views,
        "batch_norm_most_views": n.norm_most,
        "batch_norm_groups": n.norm_groups,
        "rows": len(job.train),
        "steps": n.steps,
        "lr_per_256_views": job.config.optim.lr * 256 / (n.images * n.views_per_image),
        "memory_estimate_gib": memory.needed / GIB,
        "memory_left_gib": memory.left / GIB,
        "images_per_micro_step_that_fits": memory.fits,
    }


def _measured(job: Job) -> dict[str, Any]:
    """A few steps: their rate, memory, and how near they come to the roof."""
    last = _Last()
    untimed = WARM_UPS + 1 if uses_graphs(job.config, job.ranks) else 2  # a graph is captured once it is warm
    steps = untimed + _TIMED
    try:
        with running_out_is_a_fault(job.memory):
            job.build()
            course = replace(job.course(steps), log_every=untimed, checkpoint_every=steps)
            batches = job.batches(range(steps), 0)
            parts = (
                course,
                batches,
                job.task,
                job.engine,
                job.lr_of,
                job.work_of,
                None,
                lambda *_: None,
                last,
                job.clock,
            )
            run(*parts, job.bad_images)
            batches.close()
    finally:
        job.close()
    n, timed = job.numbers, last.values
    return {
        "parameters": sum(p.numel() for p in job.engine.model.parameters()),
        "memory_gib": timed["memory_gib"],
        "views_per_s": timed["views_per_s"],
        "expected_hours": timed["step_s"] * n.steps / 3600,
        **_roof(job, timed["step_s"]),
    }


def _roof(job: Job, step_s: float) -> dict[str, Any]:
    """The first step's work on one rank's share, and its rate against what this device was measured to do; empty where
    a job counts no work."""
    n, work = job.numbers, job.work_of(0)
    if not work.flops:
        return {}
    return {
        "step_flops": work.flops,
        "step_bytes": work.bytes,
        "device_flops_per_s": job.rates.flops,
        "device_bytes_per_s": job.rates.bytes,
        "roof_views_per_s": n.images * n.views_per_image / work.least_s,
        **work.reached(step_s),
    }


def _show_plan(config: Config, r: dict[str, Any], memory: Memory) -> None:
    left = (
        f"{memory.left / GIB:.1f} GiB are left of {'the GPU' if memory.device == 'cuda' else 'the host'}'s for a rank"
    )
    o = config.optim
    epochs = o.epochs if o.steps is None else round(o.steps * o.images_per_step / r["rows"], 1)
    terminal.table(
        "plan",
        [
            (
                "a step",
                f"{r['images_per_step']} images = {r['views_per_step']} views over {r['ranks']} ranks, "
                f"{r['micro_steps']} micro-steps, at most {r['largest_share_images']} images a rank at once",
            ),
            ("batch norm", _norm_says(r)),
            ("rate", f"{config.optim.lr:g} at its peak, {r['lr_per_256_views']:g} per 256 views"),
            ("steps", f"{r['steps']:,} = {epochs:g} epochs of {r['rows']:,} images"),
            (
                "memory of a rank",
                f"about {memory.needed / GIB:.1f} GiB: {memory.state / GIB:.2f} of weights and their like, "
                f"{memory.maps / GIB:.1f} of maps of {memory.images} images at {memory.side}, "
                f"{memory.ahead / GIB:.2f} of images ahead"
                + (f"; and {memory.on_host / GIB:.2f} on the host" if memory.on_host else ""),
            ),
            ("memory here", left if memory.enough else f"{left}: too little; {memory.proposes()}"),
        ],
    )


def _norm_says(r: dict[str, Any]) -> str:
    least, most, groups = r["batch_norm_views"], r["batch_norm_most_views"], r["batch_norm_groups"]
    views = f"{least} views" if least == most else f"{least} to {most} views"
    size = r["ranks"] // groups
    where = f" in each of {groups} groups of {size} rank{'s' * (size > 1)}" if groups > 1 else ""
    return f"over {views}{where} (recipe {RECIPE_VIEWS})"


def _show_measured(r: dict[str, Any]) -> None:
    rows = [
        ("parameters", f"{r['parameters']:,}"),
        ("memory", f"{r['memory_gib']:.2f} GiB on rank 0 at its peak"),
        ("expected", f"{r['expected_hours']:.2f} hours at {r['views_per_s']:,.0f} views/s, measured on two steps"),
    ]
    if "step_flops" in r:
        rows += [
            (
                "work of a rank",
                f"{r['step_flops'] / 1e12:.3g} TFLOP and {r['step_bytes'] / 2**30:.3g} GiB a step, unfused; measured here: "
                f"{r['device_flops_per_s'] / 1e12:.3g} TFLOP/s, {r['device_bytes_per_s'] / 1e9:.3g} GB/s",
            ),
            (
                "roof",
                f"{r['roof_views_per_s']:,.0f} views/s; these steps reached {r['roof_fraction']:.0%} of it, "
                f"and {r['mfu']:.0%} of the measured TFLOP/s",
            ),
        ]
    terminal.table("measured", rows)
