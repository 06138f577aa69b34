"""A run from its config: opens the data, builds the parts, hands them to the loop."""

import fcntl
import json
import math
import os
import shutil
import socket
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from fastrot import checkpoint, distributed, optim, runlog
from fastrot.config import Config, to_yaml
from fastrot.data.decode import make_decoder
from fastrot.data.faults import BadImages
from fastrot.data.loader import DECODES_IN_FLIGHT, Loader
from fastrot.data.manifest import Manifest, index
from fastrot.data.order import FullOrder, WindowOrder
from fastrot.data.plan import Plan, micro_steps_of, slice_of
from fastrot.data.storage import FileStorage
from fastrot.distributed import Ranks
from fastrot.engine import AUTOCAST, StepSettings, make_engine
from fastrot.errors import UserError
from fastrot.loop import Course, run
from fastrot.model import TURNS, synchronise_batchnorm
from fastrot.profiling.clock import Clock
from fastrot.tasks.rotation import RotationTask

RECIPE_VIEWS = 512  # that batch norm sees in the published run
_FIXED = ("model.arch", "run.seed", "data")  # no resume can change these
_DEFINING = (
    "model.",
    "rotation.",
    "optim.",
    "run.seed",
    "engine.precision",
    "data.crop",
    "data.crop_by_epoch",
    "data.scale",
    "data.ratio",
    "data.flip",
    "data.mean",
    "data.std",
    "data.order",
    "data.window_rows",
    "data.window_chunks",
)


@dataclass(frozen=True)
class Arithmetic:
    """How a step is shared out. images: of a step over all ranks; largest: of one rank at once."""

    images: int
    ranks: int
    micro_steps: int
    views_per_image: int
    steps: int
    largest: int
    norm_views: int


def arithmetic(config: Config, ranks: int, rows: int) -> Arithmetic:
    """The step's shares. Raises UserError where a rank would get no image."""
    images, engine = config.optim.images_per_step, config.engine
    views = 4 if config.rotation.views == "all" else 1
    if rows < ranks:
        raise UserError(f"data.train: {rows} images for {ranks} ranks; start at most one rank an image")
    if images < ranks:
        raise UserError(
            f"optim.images_per_step {images} leaves some of {ranks} ranks without an image; "
            f"raise it to {ranks} or more, or start fewer ranks"
        )
    micro_steps = micro_steps_of(images, ranks, engine.images_per_micro_step)
    shares = [slice_of(images, ranks, micro_steps, a, r) for a in range(micro_steps) for r in range(ranks)]
    sizes = [last - first for first, last in shares]
    if min(sizes) < 1:
        raise UserError(
            f"engine.images_per_micro_step {engine.images_per_micro_step} splits a step of {images} images "
            f"over {ranks} ranks into empty shares; raise it"
        )
    norm = (images // micro_steps if config.model.sync_batchnorm else max(sizes)) * views
    steps = math.ceil(config.optim.epochs * rows / images)
    return Arithmetic(images, ranks, micro_steps, views, steps, max(sizes), norm)


def plan_of(config: Config, manifest: Manifest) -> Plan:
    data, n = config.data, len(manifest)
    order = (
        FullOrder(n, config.run.seed)
        if data.order == "full"
        else WindowOrder(n, config.run.seed, data.window_rows, data.window_chunks)
    )
    return Plan(
        config.run.seed,
        manifest.height,
        manifest.width,
        order,
        config.rotation.views,
        data.scale,
        data.ratio,
        data.flip,
    )


def open_manifest(source: str | None, config: Config, ranks: Ranks, key: str) -> Manifest:
    """Index a source on rank 0 and map the result on every rank."""
    if source is None:
        raise UserError(f"{key} is not set; name an image folder, as in {key}=/path, or list:FILE")
    cache = distributed.cache_folder() / "manifests"
    folder = distributed.on_first(ranks, lambda: index(source, cache, config.data.max_pixels, runlog.track))
    return Manifest.load(folder)


def describe(manifest: Manifest, say) -> None:
    """What an index left out: a line each kind."""
    if manifest.skipped:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(manifest.skipped.items()))
        say(f"{manifest.source}: passed over {kinds}")
    if manifest.quarantined:
        path, reason = manifest.quarantined[0]
        say(
            f"{manifest.source}: {len(manifest.quarantined)} files are no sound images and are left out, the first: {path}: {reason}"
        )
    if len(manifest.classes) == 1:
        say(f"{manifest.source}: one class ({manifest.classes[0]}); rotation needs no labels, so this trains")


def make_loader(
    config: Config, manifest: Manifest, ranks: Ranks, batch: int, bad_path: Path | None
) -> tuple[Loader, str]:
    """A loader over a manifest, and the line that says how it decodes."""
    data = config.data
    threads = data.threads or max(1, (os.cpu_count() or 1) // ranks.local_world)
    decoder, line = make_decoder(data.decode, data.decode_on, ranks.device, threads, batch, DECODES_IN_FLIGHT)
    most = data.max_bad if data.max_bad is not None else max(10, len(manifest) // 1000)
    loader = Loader(
        manifest,
        plan_of(config, manifest),
        FileStorage(manifest),
        decoder,
        BadImages(bad_path, most),
        ranks.device,
        data.prefetch,
        data.timeout,
    )
    return loader, line


def defining(config: Config, content: str) -> dict:
    """What a resumed run must share with its checkpoint: flat keys and the data's content hash."""
    flat = {
        f"{section}.{key}": value
        for section, body in config.model_dump(mode="json").items()
        for key, value in body.items()
    }
    return {
        key: value
        for key, value in flat.items()
        if any(key == d or (d.endswith(".") and key.startswith(d)) for d in _DEFINING)
    } | {"data": content}


class Job:
    """The parts of one run, built once for training and for --dry-run alike."""

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        train: Manifest,
        val: Manifest | None,
        folder: Path | None,
        deepspeed_config: str | None,
        say,
    ):
        self.config, self.ranks, self.say = config, ranks, say
        self.train, self.val = train, val
        self.numbers = arithmetic(config, ranks.world, len(train))
        bad = folder / "bad_images.jsonl" if folder else None
        self.loader, line = make_loader(config, train, ranks, self.numbers.largest, bad)
        say(line)
        self.val_loader = make_loader(config, val, ranks, self.numbers.largest, bad)[0] if val else None
        self.clock = Clock(ranks.device)
        self._build_step(deepspeed_config)

    def _build_step(self, deepspeed_config: str | None) -> None:
        config, ranks = self.config, self.ranks
        o, e = config.optim, config.engine
        torch.use_deterministic_algorithms(e.deterministic)
        torch.backends.cudnn.benchmark = not e.deterministic
        torch.set_float32_matmul_precision("highest" if e.precision == "fp32" else "high")
        self.task = RotationTask(
            [255 * v for v in config.data.mean],
            [255 * v for v in config.data.std],
            AUTOCAST.get(e.precision, torch.float32),
            ranks.device,
            config.rotation.shuffle_labels,
        )
        model = self.task.build_model(config.model.arch, config.run.seed)
        if config.model.sync_batchnorm:
            synchronise_batchnorm(model)
        elif ranks.world > 1:
            self.say(
                f"model.sync_batchnorm is off: batch norm over each rank's views alone, not the recipe's {RECIPE_VIEWS}"
            )
        model.to(ranks.device)
        optimizer = optim.build_optimizer(
            o.name,
            model,
            lr=o.lr,
            momentum=o.momentum,
            nesterov=o.nesterov,
            weight_decay=o.weight_decay,
            decay_norms=o.decay_norms,
            trust=o.trust,
            fused=e.precision != "fp16",
        )
        settings = StepSettings(e.precision, e.zero, o.clip, o.momentum, e.channels_last)
        batch = {
            "train_batch_size": self.numbers.images,
            "gradient_accumulation_steps": self.numbers.micro_steps,
            "train_micro_batch_size_per_gpu": self.numbers.largest,
        }
        self.engine = make_engine(e.kind, model, optimizer, settings, ranks, batch, deepspeed_config)
        if e.compile:
            model.compile()
        self.parameters = sum(p.numel() for p in model.parameters())

    def lr_of(self, epoch: float) -> float:
        o = self.config.optim
        return optim.lr_at(
            epoch,
            epochs=o.epochs,
            peak=o.lr,
            schedule=o.schedule,
            warmup_epochs=o.warmup_epochs,
            warmup_ratio=o.warmup_ratio,
            milestones=o.milestones,
            gamma=o.gamma,
            power=o.power,
            final=o.final_lr,
        )

    def crop_at(self, epoch: float) -> int:
        reached = [first for first in self.config.data.crop_by_epoch if first <= epoch]
        return self.config.data.crop_by_epoch[max(reached)] if reached else self.config.data.crop

    def batches(self, steps: range, position: int):
        n = self.numbers
        return self.loader.train(steps, position, n.images, n.ranks, self.ranks.rank, n.micro_steps, self.crop_at)

    def course(self, last_step: int) -> Course:
        run_, n = self.config.run, self.numbers
        return Course(
            last_step,
            len(self.train),
            n.images,
            n.views_per_image,
            run_.log_every,
            run_.checkpoint_every,
            run_.evaluate_every,
            run_.seed,
            self.ranks.rank,
        )

    def evaluate(self) -> dict[str, float]:
        """Held-out loss and accuracies over all ranks, exact for any number of them."""
        data = self.config.data
        short = data.resize or round(data.crop * 256 / 224)
        self.engine.train(False)
        batches = self.val_loader.held_out(self.ranks.world, self.ranks.rank, self.numbers.largest, short, data.crop)
        sums = self.engine.reduce(self.task.evaluate(self.engine.module, batches))
        self.engine.train(True)
        return {f"held_out_{name}": value for name, value in self.task.summary(sums).items()}

    def close(self) -> None:
        self.loader.close()
        if self.val_loader:
            self.val_loader.close()


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
        except OSError:
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


def _frozen(folder: Path, name: str, source: str | None, config: Config, ranks: Ranks) -> Manifest:
    """The run's own copy of a manifest; made at the first start, and when the source has moved."""
    home = folder / "manifest" / name
    if source is not None and (home / "meta.json").exists():
        kept = Manifest.load(home)
        if kept.source == source:
            return kept
    manifest = open_manifest(source, config, ranks, f"data.{name}")
    distributed.on_first(ranks, lambda: manifest.save(home))
    return Manifest.load(home)


def train(config: Config, ranks: Ranks, resume: str, resume_anyway: list[str], deepspeed_config: str | None) -> dict:
    """Train, or go on training, in run.out. Returns what --json prints."""
    for key in set(resume_anyway) & set(_FIXED):
        raise UserError(f"--resume-anyway {key}: a run cannot go on with another {key}; start a new run.out")
    with _folder(config.run.out, ranks) as folder:
        saved = distributed.on_first(ranks, lambda: _find(resume, folder))
        found = checkpoint.load(Path(saved)) if saved else None
        manifest = _frozen(folder, "train", config.data.train, config, ranks)
        val = _frozen(folder, "val", config.data.val, config, ranks) if config.data.val else None
        now = defining(config, manifest.content)
        if found:
            checkpoint.refuse_differences(found.state["defining"], now, resume_anyway, found.path)
        step, position = (found.state["step"], found.state["position"]) if found else (0, 0)
        left = math.ceil((config.optim.epochs * len(manifest) - position) / config.optim.images_per_step)
        last = min(step + max(0, left), config.run.max_steps or step + max(0, left))
        log = runlog.RunLog(folder if ranks.first else None, last, step, config.run.tensorboard)
        try:
            for one in filter(None, (manifest, val)):
                describe(one, log.say)
            job = Job(config, ranks, manifest, val, folder, deepspeed_config, log.say)
            if found:
                job.engine.load_state(found.model, found.optimizer, found.state["scalars"])
                log.say(f"resumed from {found.path.name}: step {step:,} of {last:,}, stream position {position:,}")
            _write_facts(folder, config, ranks, manifest)
            result = _run(job, folder, now, range(step, last), position, log)
        except BaseException as error:
            log.status("failed", reason=f"{type(error).__name__}: {error}")
            raise
        finally:
            log.close()
        return result


def _find(resume: str, folder: Path) -> str | None:
    path = checkpoint.find(resume, folder, lambda line: runlog.console().print(line, soft_wrap=True))
    return str(path) if path else None


def _run(job: Job, folder: Path, now: dict, steps: range, position: int, log) -> dict:
    saver = checkpoint.Saver(folder, job.config.run.keep_last, log.say)
    course, first = job.course(steps.stop), job.ranks.first

    def save(done: int, next_position: int, accuracy: float | None) -> None:
        model, momenta, scalars = job.engine.state()
        if first:
            state = {"step": done, "position": next_position, "scalars": scalars, "defining": now}
            saver.save(done, model, momenta, state, accuracy)
            log.status("running", step=done, of=course.last_step, held_out_accuracy=accuracy)

    log.status("running", step=steps.start, of=steps.stop)
    began = time.monotonic()
    evaluate = job.evaluate if job.val_loader else None
    job.clock.skip()
    result = run(course, job.batches(steps, position), job.task, job.engine, job.lr_of, evaluate, save, log, job.clock)
    if not steps and evaluate:
        result = evaluate()
    saver.finish()
    distributed.on_first(job.ranks, saver.check)
    job.close()
    result |= {"steps": steps.stop, "seconds": time.monotonic() - began, "out": str(folder)}
    if first:
        latest = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip()
        shutil.copyfile(latest / "backbone.safetensors", folder / "backbone.safetensors")
    log.status("done", **result)
    log.close()
    if first:
        _show(result)
    return result


def _show(result: dict) -> None:
    """The short table a run ends with."""
    rows = [("steps", f"{result['steps']:,} in {runlog.duration(result['seconds'])}")]
    if "held_out_accuracy" in result:
        rows.append(("held-out rotation accuracy", f"{result['held_out_accuracy']:.1%} (chance {1 / TURNS:.0%})"))
    if "views_per_s" in result:
        rows += [
            ("throughput", f"{result['images_per_s']:,.0f} images/s, {result['views_per_s']:,.0f} views/s"),
            ("time waiting for data", f"{result['wait_share']:.1%}"),
        ]
    runlog.table("rotation pretraining", [*rows, ("outputs", result["out"])])


def _write_facts(folder: Path, config: Config, ranks: Ranks, manifest: Manifest) -> None:
    if ranks.first:
        checkpoint.write_text(folder / "config.yaml", to_yaml(config))
        facts = runlog.environment(f"{ranks.world} on {ranks.device.type}") | {
            "data": {"content": manifest.content, "storage": manifest.storage, "rows": len(manifest)}
        }
        checkpoint.write_text(folder / "environment.json", json.dumps(facts, indent=1) + "\n")
