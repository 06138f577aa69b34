"""--dry-run: build everything, run a few steps, and say what the run would be."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from fastrot import terminal
from fastrot.config import Config, flat
from fastrot.data.build import describe, open_manifest
from fastrot.data.manifest import Manifest
from fastrot.distributed import Ranks
from fastrot.engine.graphs import WARM_UPS
from fastrot.runs.arithmetic import RECIPE_VIEWS
from fastrot.runs.build import Job
from fastrot.runs.loop import run

_TIMED = 2  # steps after those that warm up, with the loader running ahead


class _Last:
    """In place of a run's log: keeps the last line."""

    def tick(self) -> None: ...

    def write(self, values: dict) -> None:
        self.values = values


def dry_run(
    config: Config,
    sources: dict[str, str],
    ranks: Ranks,
    deepspeed_config: str | None,
    make_job: Callable[..., Job] = Job,
    choose: Callable[[Manifest], Manifest] | None = None,
) -> dict:
    """Time two steps after those that warm up; writes nothing but the named caches.

    Prints the resolved config with each value's source, the batch arithmetic, size and hours.
    make_job, choose  as in runs.run.train.
    """
    say = partial(terminal.console().print, soft_wrap=True, markup=False) if ranks.first else lambda line: None
    train = open_manifest(config.data.train, config, ranks, "data.train")
    train = choose(train) if choose else train
    val = open_manifest(config.data.val, config, ranks, "data.val") if config.data.val else None
    for manifest in filter(None, (train, val)):
        describe(manifest, say)
    job = make_job(config, ranks, train, val, None, deepspeed_config, say)
    n, last = job.numbers, _Last()
    untimed = WARM_UPS + 1 if config.engine.cuda_graphs else 2  # a graph is captured once it is warm
    steps = untimed + _TIMED
    course = replace(job.course(steps), log_every=untimed, checkpoint_every=steps)
    batches = job.batches(range(steps), 0)
    run(course, batches, job.task, job.engine, job.lr_of, job.work_of, None, lambda *_: None, last, job.clock)
    batches.close()
    job.close()
    timed = last.values
    hours = timed["step_s"] * n.steps / 3600
    result = {
        "images_per_step": n.images,
        "views_per_step": n.images * n.views_per_image,
        "ranks": n.ranks,
        "micro_steps": n.micro_steps,
        "largest_share_images": n.largest,
        "batch_norm_views": n.norm_views,
        "rows": len(train),
        "steps": n.steps,
        "parameters": job.parameters,
        "memory_gib": timed["memory_gib"],
        "lr_per_256_views": config.optim.lr * 256 / (n.images * n.views_per_image),
        "views_per_s": timed["views_per_s"],
        "expected_hours": hours,
        **_roof(job, timed["step_s"]),
    }
    if ranks.first:
        _show(config, sources, result)
    return result


def _roof(job: Job, step_s: float) -> dict:
    """The first step's work on one rank's share, and its rate against what this device was measured to do."""
    n, work = job.numbers, job.work_of(0)
    return {
        "step_flops": work.flops,
        "step_bytes": work.bytes,
        "device_flops_per_s": job.rates.flops,
        "device_bytes_per_s": job.rates.bytes,
        "roof_views_per_s": n.images * n.views_per_image / work.least_s,
        **work.reached(step_s),
    }


def _show(config: Config, sources: dict[str, str], r: dict) -> None:
    terminal.table("config", [(key, f"{value}  ({sources[key]})") for key, value in flat(config).items()])
    terminal.table(
        "dry run",
        [
            (
                "a step",
                f"{r['images_per_step']} images = {r['views_per_step']} views over {r['ranks']} ranks, "
                f"{r['micro_steps']} micro-steps, at most {r['largest_share_images']} images a rank at once",
            ),
            ("batch norm", f"over {r['batch_norm_views']} views (recipe {RECIPE_VIEWS})"),
            ("rate", f"{config.optim.lr:g} at its peak, {r['lr_per_256_views']:g} per 256 views"),
            ("steps", f"{r['steps']:,} = {config.optim.epochs:g} epochs of {r['rows']:,} images"),
            ("parameters", f"{r['parameters']:,}"),
            ("memory", f"{r['memory_gib']:.2f} GiB on rank 0 at its peak"),
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
            ("expected", f"{r['expected_hours']:.2f} hours at {r['views_per_s']:,.0f} views/s, measured on two steps"),
        ],
    )
