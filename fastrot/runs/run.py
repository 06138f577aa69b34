"""A pretraining run in its folder: held against a second, resumed, trained, summed up."""

import fcntl
import json
import math
import os
import shutil
import socket
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from fastrot import distributed, machine, terminal
from fastrot.config import Config, flat, to_yaml
from fastrot.data.build import FILES, admit_changed_files, describe, open_manifest
from fastrot.data.manifest import Manifest
from fastrot.distributed import Ranks
from fastrot.errors import Fault, LostPeer, UserError
from fastrot.files import write_text
from fastrot.runs import checkpoint
from fastrot.runs.build import Job, set_torch_flags
from fastrot.runs.log import RunLog, write_status
from fastrot.runs.loop import run
from fastrot.runs.memory import admit, running_out_is_a_fault

Chooser = Callable[[Manifest], Manifest]
_FIXED = ("model.arch", "run.seed", "data")  # no resume can change these
_DEFINING = (
    "model.",
    "rotation.",
    "optim.",
    "run.seed",
    "engine.precision",
    "data.crop",
    "data.crop_by_epoch",
    "data.window",
    "data.scale",
    "data.ratio",
    "data.flip",
    "data.mean",
    "data.std",
    "data.order",
    "data.window_rows",
    "data.window_chunks",
)


def defining(config: Config, content: str) -> dict:
    """What a resumed run must share with its checkpoint: flat keys and the data's content hash."""
    of_window = ("data.resize",) if config.data.window == "random" else ()
    return {
        key: value
        for key, value in flat(config).items()
        if any(key == d or (d.endswith(".") and key.startswith(d)) for d in (*_DEFINING, *of_window))
    } | {"data": content}


@contextmanager
def _folder(out: str, ranks: Ranks):
    """The run's folder, held against a second run. Raises UserError where it cannot be."""
    folder = Path(out)

    def hold():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"run.out {out}: is a file, or lies below one; name a folder") from None
        except OSError as error:
            raise UserError(f"run.out {out}: cannot be written ({error.strerror})") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 200).decode(errors="replace")
            raise UserError(f"run.out {out}: another run works there ({holder}); name another folder") from None
        os.truncate(handle, 0)
        os.pwrite(handle, f"host {socket.gethostname()}, process {os.getpid()}".encode(), 0)
        return handle

    handle = distributed.on_first(ranks, hold)
    try:
        yield folder
    finally:
        if ranks.first:
            os.close(handle)


def _frozen(
    folder: Path, name: str, source: str, resumed: bool, config: Config, ranks: Ranks, choose: Chooser | None = None
) -> Manifest:
    """The run's own copy of a manifest: kept when the run goes on over the same source, else made anew."""
    home = folder / "manifest" / name

    def kept() -> bool:
        return resumed and (home / "meta.json").exists() and Manifest.load(home).source == source

    if not distributed.on_first(ranks, kept):
        manifest = open_manifest(source, config, ranks, f"data.{name}")
        manifest = choose(manifest) if choose else manifest
        distributed.on_first(ranks, lambda: manifest.save(home))
    return Manifest.load(home)


def _admitted(manifest: Manifest, home: Path, allowed: bool, ranks: Ranks) -> Manifest:
    """A resumed run's manifest, frozen in `home`, once rank 0 has looked at its files."""

    def admit() -> None:
        admit_changed_files(manifest, home, allowed, _say)

    distributed.on_first(ranks, admit)
    return Manifest.load(home)


def _say(line: str) -> None:
    """A line before there is a log."""
    terminal.console().print(line, soft_wrap=True, markup=False)


def train(
    config: Config,
    ranks: Ranks,
    resume: str,
    resume_anyway: list[str],
    deepspeed_config: str | None,
    make_job: Callable[..., Job] = Job,
    more: dict | None = None,
    choose: Chooser | None = None,
) -> dict:
    """Train, or go on training, in run.out. Returns what --json prints.

    make_job  Job, or one that learns another thing; more: what else a resume must find unchanged.
    choose    which of the training images to learn from; default: all.
    """
    set_torch_flags(config)
    with _folder(config.run.out, ranks) as folder:
        path = distributed.on_first(ranks, lambda: _find(resume, folder))
        found = checkpoint.load(Path(path)) if path else None
        manifest = _frozen(folder, "train", config.data.train, bool(found), config, ranks, choose)
        val = _frozen(folder, "val", config.data.val, bool(found), config, ranks) if config.data.val else None
        now = defining(config, manifest.content) | (more or {})
        saved_state = found.state if found else {"step": 0, "position": 0, "defining": now}
        where = found.path if found else folder
        saved = defining(Config(), "") | saved_state["defining"]  # a knob that it does not know was at its default
        files = {FILES: ""}  # they differ or not by what lies on the disk, below
        checkpoint.refuse_differences(saved | files, now | files, resume_anyway, _FIXED, where)
        if found:
            manifest = _admitted(manifest, folder / "manifest" / "train", FILES in resume_anyway, ranks)
            val = val and _admitted(val, folder / "manifest" / "val", FILES in resume_anyway, ranks)
        step, position = saved_state["step"], saved_state["position"]
        left = max(0, math.ceil((config.optim.epochs * len(manifest) - position) / config.optim.images_per_step))
        last = max(step, min(step + left, config.run.max_steps or step + left))
        log = RunLog(folder if ranks.first else None, last, step, config.run.tensorboard)
        try:
            for one in filter(None, (manifest, val)):
                describe(one, log.say)
            job = make_job(config, ranks, manifest, val, folder, deepspeed_config, log.say)
            admit(job.memory, log.say)
            job.build()
            if found:
                job.engine.load_state(found.model, found.optimizer, found.state["scalars"])
                log.say(f"resumed from {where.name}: step {step:,} of {last:,}, stream position {position:,}")
            _write_facts(folder, job, manifest)
            distributed.limit_waits(config.run.timeout)
            with distributed.lost_peer_is_a_fault(ranks), running_out_is_a_fault(job.memory):
                result = _run(job, folder, now, range(step, last), position, log)
            if ranks.first:
                newest = folder / "checkpoints" / f"step-{last:08d}" if last > step else where
                shutil.copyfile(newest / "backbone.safetensors", folder / "backbone.safetensors")
            log.status("done", **result)
        except BaseException as error:
            # the rank that failed knows why, better than those who lost it
            if (ranks.first or isinstance(error, Fault)) and not (isinstance(error, LostPeer) and _has_failed(folder)):
                write_status(folder, "failed", rank=ranks.rank, reason=f"{type(error).__name__}: {error}")
            raise
        finally:
            log.close()
    if ranks.first:
        _show(result, job.task)
    return result


def _has_failed(folder: Path) -> bool:
    """Whether another rank has written that it failed."""
    try:
        return json.loads((folder / "STATUS.json").read_text())["state"] == "failed"
    except (OSError, ValueError, KeyError):
        return False


def _find(resume: str, folder: Path) -> str | None:
    path = checkpoint.find(resume, folder, _say)
    return str(path) if path else None


def _run(job: Job, folder: Path, now: dict, steps: range, position: int, log) -> dict:
    saver = checkpoint.Saver(folder, job.config.run.keep_last, log.say)
    course, first = job.course(steps.stop), job.ranks.first

    best = distributed.on_first(job.ranks, lambda: saver.best)

    def save(done: int, next_position: int, accuracy: float | None, due: bool) -> None:
        nonlocal best
        better = accuracy is not None and (best is None or accuracy > best)
        if not (due or better):
            return
        best = accuracy if better else best
        model, momenta, scalars = job.engine.state()
        if first:
            state = {"step": done, "position": next_position, "scalars": scalars, "defining": now}
            saver.save(done, model, momenta, state, accuracy)
            bad = job.bad_images()
            log.status("running", step=done, of=course.last_step, held_out_accuracy=accuracy, bad_images=bad)

    log.status("running", step=steps.start, of=steps.stop)
    began = time.monotonic()
    evaluate = job.evaluate if job.val_loader else None
    job.clock.skip()
    batches = job.batches(steps, position)
    try:
        parts = (course, batches, job.task, job.engine, job.lr_of, job.work_of, evaluate, save, log, job.clock)
        result = run(*parts, job.bad_images)
        if not steps and evaluate:
            result = evaluate()
    finally:
        saver.finish()
        batches.close()
        job.close()
    distributed.on_first(job.ranks, saver.check)
    return result | {
        "bad_images": job.bad_images(),
        "steps": steps.stop,
        "seconds": time.monotonic() - began,
        "out": str(folder),
    }


def _show(result: dict, task) -> None:
    """The short table a run ends with."""
    rows = [("steps", f"{result['steps']:,} in {terminal.duration(result['seconds'])}")]
    if "held_out_accuracy" in result:
        rows.append((task.says, f"{result['held_out_accuracy']:.1%}"))
    if "held_out_top5" in result:
        rows.append(("held-out top-5", f"{result['held_out_top5']:.1%}"))
    if "views_per_s" in result:
        rows += [
            ("throughput", f"{result['images_per_s']:,.0f} images/s, {result['views_per_s']:,.0f} views/s"),
            ("time waiting for data", f"{result['wait_share']:.1%}"),
        ]
    if result["bad_images"]:
        rows.append(("images replaced", f"{result['bad_images']:,}, listed in {result['out']}/bad_images.jsonl"))
    if "mfu" in result:
        rows.append(("MFU, share of the roof", f"{result['mfu']:.1%}, {result['roof_fraction']:.1%}"))
    terminal.table(task.title, [*rows, ("outputs", result["out"])])


def _write_facts(folder: Path, job: Job, manifest: Manifest) -> None:
    config, ranks = job.config, job.ranks
    if ranks.first:
        write_text(folder / "config.yaml", to_yaml(config))
        facts = machine.environment(f"{ranks.world} on {ranks.device.type}") | {
            "data": {"content": manifest.content, "storage": manifest.storage, "rows": len(manifest)},
            "device_per_s": asdict(job.rates),
        }
        write_text(folder / "environment.json", json.dumps(facts, indent=1) + "\n")
