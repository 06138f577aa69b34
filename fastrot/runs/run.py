"""A training in its folder: held against a second, resumed, trained, summed up."""

import fcntl
import json
import math
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastrot import distributed, machine, terminal
from fastrot.config import Config, flat, to_yaml
from fastrot.data.build import FILES, admit_changed_files, at_hand, manifest_of_first, open_manifest, plan_of
from fastrot.data.manifest import Manifest
from fastrot.data.remarks import describe
from fastrot.distributed import Ranks
from fastrot.errors import Diverged, Fault, LostPeer, Stopped, UserError
from fastrot.files import clear_scratch, replacing, write_text
from fastrot.runs import checkpoint, loggers
from fastrot.runs.arithmetic import steps_left
from fastrot.runs.build import Job, set_torch_flags
from fastrot.runs.epochs import Recorder
from fastrot.runs.log import RunLog, read_status, write_refusal, write_status
from fastrot.runs.loop import run
from fastrot.runs.memory import admit, running_out_is_a_fault
from fastrot.runs.mirror import Mirror
from fastrot.runs.resume import resume_point
from fastrot.runs.stop import CTRL_C, Stop
from fastrot.tasks import Task

Chooser = Callable[[Manifest], Manifest]
_FIXED = ("model.arch", "run.seed", "data")  # no resume can change these
_DEFINING = (
    "model.",
    "rotation.",
    "optim.",
    "run.seed",
    "engine.precision",
    "engine.loss_scale",
    "data.crop",
    "data.crop_by_epoch",
    "data.window",
    "data.scale",
    "data.ratio",
    "data.flip",
    "data.fit",
    "data.jpeg",
    "data.jpeg_quality",
    "data.chroma_shift",
    "data.border",
    "data.blur",
    "data.mean",
    "data.std",
    "data.order",
    "data.window_rows",
    "data.window_chunks",
)


def defining(config: Config, content: str) -> dict[str, Any]:
    """What a resumed run must share with its checkpoint: flat keys and the data's content hash."""
    of_window = ("data.resize",) if config.data.window == "random" else ()
    return {
        key: value
        for key, value in flat(config).items()
        if any(key == d or (d.endswith(".") and key.startswith(d)) for d in (*_DEFINING, *of_window))
    } | {"data": content}


@contextmanager
def _folder(out: str, ranks: Ranks) -> Iterator[Path]:
    """The run's folder, held against a second run. Raises UserError where it cannot be."""
    folder = Path(out)

    def hold() -> int:
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
        try:
            os.truncate(handle, 0)
            os.pwrite(handle, f"host {socket.gethostname()}, process {os.getpid()}".encode(), 0)
        except OSError as error:
            raise UserError(f"run.out {out}: cannot be written ({error.strerror})") from None
        return handle

    handle = distributed.on_first(ranks, hold)
    distributed.agree(ranks, _made(folder))
    try:
        yield folder
    finally:
        if ranks.first:
            os.close(handle)


def _made(folder: Path) -> str:
    """Why this node, which may not see rank 0's folder, cannot have one for its own bad images; or nothing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"run.out {folder}: cannot be written ({error.strerror})"
    return ""


@dataclass(frozen=True)
class _Start:
    """A start that is admitted: nothing in the run's folder has changed for it.

    found   the checkpoint it goes on from, or None; steps to train, from stream position `position`.
    now     what defines the run; unkept: manifests, by name, that its folder does not hold.
    """

    job: Job
    found: checkpoint.Checkpoint | None
    steps: range
    position: int
    now: dict[str, Any]
    unkept: dict[str, Manifest]


def _manifest(folder: Path, name: str, resumed: bool, config: Config, ranks: Ranks) -> tuple[Manifest, bool]:
    """The manifest of a run's images, and whether it is the run's own copy: that of a run that goes on over the same
    source."""
    key = f"data.{name}"
    home, source = folder / "manifest" / name, at_hand(getattr(config.data, name), config, ranks, key)

    def kept() -> bool:
        return resumed and (home / "meta.json").exists() and Manifest.load(home).source == source

    if distributed.on_first(ranks, kept):
        return manifest_of_first(lambda: home, str(source), ranks, key), True
    return open_manifest(source, config, ranks, key), False


def _with_files_as_they_are(manifest: Manifest, allowed: bool, ranks: Ranks) -> tuple[Manifest, bool]:
    """A run's own manifest once rank 0 has looked at its files; and whether they changed, as is allowed."""
    renewed = distributed.on_first(ranks, lambda: admit_changed_files(manifest, allowed, _say))
    return (manifest.with_files_as_they_are(), True) if renewed else (manifest, False)


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
    more: dict[str, Any] | None = None,
    choose: Chooser | None = None,
) -> dict[str, Any]:
    """Train, or go on training, in run.out. Returns what --json prints.

    make_job  Job, or one that learns another thing; more: what else a resume must find unchanged.
    choose    which of the training images to learn from; default: all.
    """
    distributed.on_first(ranks, lambda: loggers.refuse_missing(config.run.loggers))
    set_torch_flags(config)
    until = None if config.run.max_hours is None else time.monotonic() + 3600 * config.run.max_hours
    with _folder(config.run.out, ranks) as folder:
        log, begun = RunLog(folder if ranks.first else None), False
        mirror = Mirror(config.run.mirror, folder, log.say) if config.run.mirror and ranks.first else None
        try:
            start = _admit(config, ranks, folder, resume, resume_anyway, deepspeed_config, make_job, more, choose, log)
            distributed.on_first(ranks, lambda: _begin(folder, start, log))
            begun = True
            distributed.limit_waits(config.run.timeout)
            with distributed.lost_peer_is_a_fault(ranks), running_out_is_a_fault(start.job.memory):
                result = _run(start, folder, log, until, mirror)
            if "stopped" in result:
                # before another rank leaves, since launchers then end this one
                distributed.on_first(ranks, lambda: log.status("stopped", **result))
                raise _stopped(result["stopped"])
            distributed.on_first(ranks, lambda: _keep_backbone(folder, start))
            log.status("done", **result)
        except BaseException as error:
            said = _with_what_stands(error, folder)
            _record_failure(said, folder, ranks, begun, log)
            if said is error:
                raise
            raise said from None
        finally:
            log.close()
            if mirror:
                mirror.close(begun)
    if ranks.first:
        _show(result, start.job.task)
    return result


def _admit(
    config: Config,
    ranks: Ranks,
    folder: Path,
    resume: str,
    resume_anyway: list[str],
    deepspeed_config: str | None,
    make_job: Callable[..., Job],
    more: dict[str, Any] | None,
    choose: Chooser | None,
    log: RunLog,
) -> _Start:
    """All that may refuse a start, and the job built. Raises UserError."""
    found = resume_point(resume, folder, config.run.mirror, ranks, _say)
    manifests, unkept = {}, {}
    for name in ("train", "val") if config.data.val else ("train",):
        manifest, kept = _manifest(folder, name, bool(found), config, ranks)
        if not kept:
            manifest = unkept[name] = choose(manifest) if choose and name == "train" else manifest
        manifests[name] = manifest
    manifest, val = manifests["train"], manifests.get("val")
    now = defining(config, manifest.content) | (more or {})
    files = {FILES: ""}  # they differ or not by what lies on the disk, below
    if found:
        saved = defining(Config(), "") | found.state.defining  # a knob that it does not know was at its default
        checkpoint.refuse_differences(saved | files, now | files, resume_anyway, _FIXED, found.path)
        for name in [one for one in manifests if one not in unkept]:
            manifests[name], renewed = _with_files_as_they_are(manifests[name], FILES in resume_anyway, ranks)
            if renewed:
                unkept[name] = manifests[name]
        manifest, val = manifests["train"], manifests.get("val")
    else:
        checkpoint.refuse_differences(now | files, now | files, resume_anyway, _FIXED, folder)
    step, position = (found.state.step, found.state.position) if found else (0, 0)
    whole = step + steps_left(config, len(manifest), step, position)
    last = max(step, min(whole, config.run.max_steps or whole))
    for one in manifests.values():
        describe(one, log.say)
    job = make_job(config, ranks, manifest, val, folder, deepspeed_config, log.say)
    admit(job.memory, log.say)
    job.build()
    if found:
        job.engine.load_state(found.model, found.optimizer, found.state.scalars)
        log.say(f"resumed from {found.path.name}: step {step:,} of {last:,}, stream position {position:,}")
    elif config.model.init:
        job.begin_with(config.model.init)
    return _Start(job, found, range(step, last), position, now, unkept)


def _begin(folder: Path, start: _Start, log: RunLog) -> None:
    """Make the folder this run's. Raises UserError where it cannot be written."""
    job, config = start.job, start.job.config
    try:
        clear_scratch(folder)
        checkpoint.make_way(folder, start.steps.start)
        for name, manifest in start.unkept.items():
            manifest.save(folder / "manifest" / name)
        log.begin(start.steps, config, next(iter(job.task.figures)))
        _write_facts(folder, job, job.train)
        write_status(folder, "running", step=start.steps.start, of=start.steps.stop)
    except OSError as error:
        raise UserError(f"run.out {folder}: cannot be written ({error.strerror}); make room, or name another") from None


def _keep_backbone(folder: Path, start: _Start) -> None:
    """The newest checkpoint's backbone, beside the run's other results. Raises Fault."""
    newest = folder / "checkpoints" / f"step-{start.steps.stop:08d}"
    if not start.steps and start.found:
        newest = start.found.path
    try:
        with replacing(folder / "backbone.safetensors") as scratch:
            shutil.copyfile(newest / "backbone.safetensors", scratch)
    except OSError as error:
        raise Fault(f"{folder / 'backbone.safetensors'}: cannot be written ({error.strerror})") from None


def _with_what_stands(error: BaseException, folder: Path) -> BaseException:
    """The same error; where a user may go on, with what from."""
    if isinstance(error, KeyboardInterrupt):
        return KeyboardInterrupt(checkpoint.standing(folder))
    if isinstance(error, Stopped):
        return Stopped(f"{error}; {checkpoint.standing(folder)}")
    if isinstance(error, Diverged):
        return Diverged(f"{error}; {checkpoint.standing(folder)}: lower optim.lr or set optim.clip")
    return error


def _record_failure(error: BaseException, folder: Path, ranks: Ranks, begun: bool, log: RunLog) -> None:
    """STATUS.json by who knows why: rank 0, or the rank that failed, better than those who lost it."""
    if isinstance(error, Stopped) or (
        isinstance(error, KeyboardInterrupt) and read_status(folder).get("state") == "stopped"
    ):
        return  # said
    lost = isinstance(error, LostPeer) and read_status(folder).get("state") == "failed"
    if lost or not (ranks.first or isinstance(error, Fault)):
        return
    facts = {"rank": ranks.rank, "reason": f"{type(error).__name__}: {error}"}
    try:
        if begun:
            write_status(folder, "failed", **facts)
        else:
            write_refusal(folder, **facts)
    except OSError as unwritten:
        log.say(f"{folder / 'STATUS.json'}: cannot be written ({unwritten.strerror})")


def _stopped(why: str) -> BaseException:
    return KeyboardInterrupt() if why == CTRL_C else Stopped(f"stopped by {why}")


def _run(start: _Start, folder: Path, log: RunLog, until: float | None, mirror: Mirror | None) -> dict[str, Any]:
    job, steps = start.job, start.steps
    saver = checkpoint.Saver(folder, job.config.run.keep_last, log.say, mirror.send if mirror else None)
    course, first, judge = job.course(steps.stop), job.ranks.first, next(iter(job.task.figures))
    best = distributed.on_first(job.ranks, lambda: saver.best)
    epochs = Recorder(
        folder if first else None, plan_of(job.config, job.train), job.train.label, start.position, log.say
    )

    def save(done: int, next_position: int, figure: float | None, due: bool) -> None:
        nonlocal best
        epochs.passed(next_position)
        if figure is not None and not math.isfinite(figure):
            log.say(f"held-out {judge.replace('_', ' ')} is {figure} after {done:,} steps; it cannot be the best")
        better = checkpoint.better(figure, best)
        if not (due or better):
            return
        best = figure if better else best
        model, momenta, scalars = job.engine.state()
        checkpoint.refuse_poisoned(model, momenta, done)
        if first:
            saver.save(model, momenta, checkpoint.State(done, next_position, scalars, start.now), figure)
            facts = {f"held_out_{judge}": figure, "bad_images": job.bad_images()}
            log.status("running", step=done, of=course.last_step, **facts)

    began = time.monotonic()
    evaluate = job.evaluate if job.val else None
    job.clock.skip()
    batches = job.batches(steps, start.position)
    with Stop(job.ranks, until) as stop:
        try:
            parts = (course, batches, job.task, job.engine, job.lr_of, job.work_of, evaluate, save, log, job.clock)
            result = run(*parts, job.bad_images, stop.heard)
            if not steps and evaluate:
                result = evaluate()
            epochs.finish(whole="stopped" not in result)
        finally:
            epochs.finish(whole=False)
            saver.finish()
            batches.close()
            job.close()
    distributed.on_first(job.ranks, saver.check)
    done = result["step"] + 1 if "stopped" in result else steps.stop
    return result | {
        "bad_images": job.bad_images(),
        "steps": done,
        "steps_now": done - steps.start,
        "seconds": time.monotonic() - began,
        "out": str(folder),
    }


def _show(result: dict[str, Any], task: Task) -> None:
    """The short table a run ends with."""
    rows = [("steps", f"{result['steps_now']:,} in {terminal.duration(result['seconds'])}; {result['steps']:,} in all")]
    held_out = {says: result.get(f"held_out_{name}") for name, says in task.figures.items()}
    rows += [(says, f"{value:.1%}") for says, value in held_out.items() if value is not None]
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
