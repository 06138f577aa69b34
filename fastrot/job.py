"""The parts of a run, built from its config: data, loader, model, engine, task."""

import math
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from fastrot import optim
from fastrot.config import GRAPHING_MODES, Config
from fastrot.data.build import crop_at, make_loader, short_side, sides
from fastrot.data.manifest import Manifest
from fastrot.data.plan import micro_steps_of, slice_of
from fastrot.distributed import Ranks
from fastrot.engine import AUTOCAST, StepSettings, make_engine
from fastrot.errors import UserError
from fastrot.loop import Course
from fastrot.models.fused_conv import FUSED
from fastrot.models.recompute import recompute_blocks
from fastrot.models.resnet import pad_stem
from fastrot.models.sync_batchnorm import synchronise_batchnorm
from fastrot.profiling import roofline
from fastrot.profiling.clock import Clock
from fastrot.tasks.rotation import RotationTask

RECIPE_VIEWS = 512  # that batch norm sees in the published run


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
    norm = (images // micro_steps if config.model.sync_batchnorm else min(sizes)) * views
    if norm < 2:
        raise UserError(
            f"optim.images_per_step {images} leaves batch norm {norm} view at a time; raise it, or rotation.views=all"
        )
    steps = math.ceil(config.optim.epochs * rows / images)
    return Arithmetic(images, ranks, micro_steps, views, steps, max(sizes), norm)


def refuse_graphs(config: Config, ranks: Ranks, micro_steps: int) -> None:
    """Raise UserError where a step cannot be, or is not shown to be, replayed rightly from CUDA graphs: ours, or
    those of torch.compile's mode."""
    mode = config.engine.compile
    if mode not in GRAPHING_MODES and not config.engine.cuda_graphs:
        return
    switch = f"engine.compile {mode}" if mode in GRAPHING_MODES else "engine.cuda_graphs"
    if ranks.device.type != "cuda":
        raise UserError(f"{switch} needs a CUDA device, and there is none; set it to false")
    if ranks.world > 1 and config.model.sync_batchnorm:
        raise UserError(
            f"{switch} over {ranks.world} ranks would capture batch norm's communication, or cut its graphs there, which "
            "is not shown to work; set it to false, or model.sync_batchnorm=false (another recipe)"
        )
    if mode in GRAPHING_MODES and micro_steps > 1:
        raise UserError(
            f"{switch} keeps gradients in its graphs' memory, where the next of {micro_steps} micro-steps overwrites "
            "them; take engine.compile=max-autotune-no-cudagraphs, or leave engine.images_per_micro_step unset"
        )


def refuse_tiny_maps(config: Config, ranks: Ranks) -> None:
    """Raise UserError where a 3 x 3 convolution of stride 2 meets 1 x 1 maps in 16 bits on a CPU: oneDNN leaves the
    weights' gradient unwritten outside the middle (torch 2.11)."""
    smallest = min(sides(config))
    if ranks.device.type == "cpu" and config.engine.precision in AUTOCAST and smallest <= 16:
        raise UserError(
            f"data.crop {smallest} with engine.precision {config.engine.precision} on a CPU: torch's gradients of 1 x 1 "
            "maps hold unwritten memory there; use crops above 16, or fp32"
        )


class Job:
    """The parts of one run, built once for training and for --dry-run alike.

    head_rate  of the network's last layer, in terms of the others'.
    """

    head_rate = 1.0

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
        self.rates = roofline.measure_rates(ranks.device, self._dtype)
        self._work = {side: self.rates.work(self.step_rows(side)) for side in sides(config)}

    def _build_step(self, deepspeed_config: str | None) -> None:
        config, ranks = self.config, self.ranks
        o, e = config.optim, config.engine
        if e.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(e.deterministic)
        torch.backends.cudnn.benchmark = not e.deterministic
        torch.backends.cudnn.allow_tf32 = e.precision != "fp32"  # torch's own default is True
        torch.set_float32_matmul_precision("highest" if e.precision == "fp32" else "high")
        refuse_tiny_maps(config, ranks)
        refuse_graphs(config, ranks, self.numbers.micro_steps)
        self.task = self.make_task()
        model = self.network(config.model.sync_batchnorm)
        if e.recompute:
            recompute_blocks(model)
        if ranks.world > 1 and not config.model.sync_batchnorm:
            self.say(
                f"model.sync_batchnorm is off: batch norm over each rank's views alone, not the recipe's {RECIPE_VIEWS}"
            )
        if e.zero and e.precision in AUTOCAST:
            self.say(f"engine.zero 1 communicates gradients in {e.precision}")
        model.to(ranks.device)
        optimizer = optim.build_optimizer(
            o.name,
            model,
            lr=o.lr,
            momentum=o.momentum,
            nesterov=o.nesterov,
            weight_decay=o.weight_decay,
            decay_norms=o.decay_norms,
            head_rate=self.head_rate,
            trust=o.trust,
            fused=e.precision != "fp16",
        )
        if e.cuda_graphs and ranks.world > 1:
            self.say(
                "engine.cuda_graphs averages gradients in one piece after the backward pass, not by engine.bucket_mb"
            )
        settings = StepSettings(e.precision, e.zero, o.clip, o.momentum, e.channels_last, e.cuda_graphs, e.bucket_mb)
        batch = {
            "train_batch_size": self.numbers.images,
            "gradient_accumulation_steps": self.numbers.micro_steps,
            "train_micro_batch_size_per_gpu": self.numbers.largest,
        }
        self.engine = make_engine(e.kind, model, optimizer, settings, ranks, batch, deepspeed_config)
        if e.compile:
            # two slices of each crop, the held-out batches: few shapes, but beyond dynamo's own limit of 8 it would
            # run the network uncompiled
            torch._dynamo.config.recompile_limit = 64
            model.compile(dynamic=False, mode="default" if e.compile is True else e.compile)
        self.parameters = sum(p.numel() for p in model.parameters())

    def network(self, over_ranks: bool) -> torch.nn.Module:
        """What the config trains, on the CPU; over_ranks: batch norm over all ranks' views."""
        model = self.task.build_model(self.config.model.arch, self.config.run.seed)
        if self.config.engine.norm in FUSED:
            FUSED[self.config.engine.norm](model, over_ranks)
        if self.config.engine.stem_channels > 3:
            pad_stem(model)
        return synchronise_batchnorm(model) if over_ranks else model

    def make_task(self):
        """What is learnt; another job learns another thing."""
        return RotationTask(
            [255 * v for v in self.config.data.mean],
            [255 * v for v in self.config.data.std],
            self._dtype,
            self.ranks.device,
            self.config.rotation.shuffle_labels,
            self.config.engine.stem_channels,
        )

    @property
    def _dtype(self) -> torch.dtype:
        """Of the views and of the network's maps."""
        return AUTOCAST.get(self.config.engine.precision, torch.float32)

    def step_rows(self, side: int) -> list[roofline.Row]:
        """The operations of this rank's share of a step on crops of `side`; another job counts none."""
        n = self.numbers
        images = math.ceil(n.images / n.ranks)
        build = partial(self.network, over_ranks=False)  # nothing is communicated where nothing is computed
        return roofline.step_rows(build, images * n.views_per_image, images, side, self._dtype)

    def work_of(self, epoch: float) -> roofline.Work:
        """What a step at `epoch` asks of this rank's device."""
        return self._work[crop_at(self.config, epoch)]

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

    def batches(self, steps: range, position: int):
        n = self.numbers
        return self.loader.train(
            steps, position, n.images, n.ranks, self.ranks.rank, n.micro_steps, partial(crop_at, self.config)
        )

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
        self.engine.train(False)
        batches = self.val_loader.held_out(
            self.ranks.world, self.ranks.rank, self.numbers.largest, short_side(self.config), self.config.data.crop
        )
        sums = self.engine.reduce(self.task.evaluate(self.engine.module, batches))
        self.engine.train(True)
        return {f"held_out_{name}": value for name, value in self.task.summary(sums).items()}

    def close(self) -> None:
        self.loader.close()
        if self.val_loader:
            self.val_loader.close()
