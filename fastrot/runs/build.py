"""The parts of a run, built from its config: data, loader, model, engine, task."""

import math
import os
from functools import partial
from pathlib import Path

import torch

from fastrot.config import Config
from fastrot.data.build import crop_at, make_loader, short_side, sides
from fastrot.data.manifest import Manifest
from fastrot.distributed import Ranks
from fastrot.engine import AUTOCAST, StepSettings, make_engine
from fastrot.engine.optimizers import build_optimizer
from fastrot.engine.schedules import lr_at
from fastrot.models.fused_conv import FUSED
from fastrot.models.recompute import recompute_blocks
from fastrot.models.resnet import pad_stem
from fastrot.models.sync_batchnorm import synchronise_batchnorm
from fastrot.profiling import roofline
from fastrot.profiling.clock import Clock
from fastrot.runs.arithmetic import RECIPE_VIEWS, arithmetic, refuse_graphs, refuse_tiny_maps
from fastrot.runs.loop import Course
from fastrot.tasks.rotation import RotationTask


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
        optimizer = build_optimizer(
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
        return lr_at(
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
