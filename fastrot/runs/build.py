"""The parts of a run, built from its config: data, loader, model, engine, task."""

import math
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path

import torch

from fastrot.config import Config
from fastrot.data.build import crop_at, make_loader, short_side, sides
from fastrot.data.loader import Loader, StepBatch
from fastrot.data.manifest import Manifest
from fastrot.distributed import Ranks
from fastrot.engine import AUTOCAST, StepSettings, make_engine
from fastrot.engine.base import Engine
from fastrot.engine.optimizers import build_optimizer
from fastrot.errors import UserError
from fastrot.models.backbone import load_backbone
from fastrot.models.fused_conv import FUSED
from fastrot.models.over_ranks import Group, neighbours
from fastrot.models.recompute import recompute_blocks
from fastrot.models.resnet import pad_stem
from fastrot.models.sync_batchnorm import synchronise_batchnorm
from fastrot.profiling import roofline
from fastrot.profiling.clock import Clock
from fastrot.runs.arithmetic import (
    arithmetic,
    deviations,
    rate_at,
    refuse_graphs,
    refuse_norm_views,
    refuse_symmetric_memory,
    refuse_tiny_maps,
    uses_graphs,
)
from fastrot.runs.loop import Course
from fastrot.runs.memory import Memory, estimate
from fastrot.tasks import Task
from fastrot.tasks.rotation import RotationTask

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


def set_torch_flags(config: Config) -> None:
    """What a run sets for the whole process: precision, determinism, the compiler's limit. Called by who owns the
    process, before anything is computed."""
    e = config.engine
    if e.deterministic:
        os.environ.setdefault(_CUBLAS, ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(e.deterministic)
    torch.backends.cudnn.benchmark = not e.deterministic
    torch.backends.cudnn.benchmark_limit = 0  # all of its algorithms, of which torch measures 10
    torch.backends.cudnn.allow_tf32 = e.precision != "fp32"  # torch's own default is True
    torch.set_float32_matmul_precision("highest" if e.precision == "fp32" else "high")
    if e.compile:
        # two slices of each crop, the held-out batches: few shapes, but beyond dynamo's own limit of 8 it would
        # run the network uncompiled
        torch._dynamo.config.recompile_limit = 64


def fitted(model: torch.nn.Module, config: Config, over_ranks: Group | None) -> torch.nn.Module:
    """A network computed as the config wants it, in place; over_ranks: batch norm over their views."""
    if config.engine.norm in FUSED:
        FUSED[config.engine.norm](model, over_ranks)
    if config.engine.stem_channels > 3:
        pad_stem(model)
    return synchronise_batchnorm(model, over_ranks) if over_ranks else model


@contextmanager
def torch_flags_kept() -> Iterator[None]:
    """What `set_torch_flags` sets, and the number of threads, as before in the end: for who does not own the process."""
    cudnn = torch.backends.cudnn
    deterministic, precision = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    benchmark, limit, tf32 = cudnn.benchmark, cudnn.benchmark_limit, cudnn.allow_tf32
    threads, recompile, variable = (
        torch.get_num_threads(),
        torch._dynamo.config.recompile_limit,
        os.environ.get(_CUBLAS),
    )
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.set_float32_matmul_precision(precision)
        cudnn.benchmark, cudnn.benchmark_limit, cudnn.allow_tf32 = benchmark, limit, tf32
        torch.set_num_threads(threads)
        torch._dynamo.config.recompile_limit = recompile
        if variable is None:
            os.environ.pop(_CUBLAS, None)


class Job:
    """The parts of one run, for training and for --dry-run alike; each is made when it is first asked for.

    folder     where the list of bad images lies; None keeps it in memory.
    numbers    how a step is shared out.    task        what is learnt.
    loader, val_loader                      of the training and held-out images; the latter may be None.
    engine     the step.                    clock       where its time goes.
    memory     what a step needs and what is left, by estimate: before anything large is made.
    rates      of this device, measured when first asked for: under a second.
    head_rate  of the network's last layer, in terms of the others'.
    Raises UserError where a step cannot be as the config wants it.
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
        say: Callable[[str], None],
    ):
        self.config, self.ranks, self.say = config, ranks, say
        self.train, self.val = train, val
        self.numbers = arithmetic(config, ranks.world, len(train))
        refuse_tiny_maps(config, ranks)
        refuse_norm_views(config, self.numbers)
        refuse_graphs(config, ranks, self.numbers.micro_steps)
        refuse_symmetric_memory(config, ranks)
        self._bad = folder / "bad_images.jsonl" if folder else None
        self._deepspeed_config = deepspeed_config
        self.task = self.make_task()
        self.clock = Clock(ranks.device)

    @cached_property
    def loader(self) -> Loader:
        loader, line = make_loader(self.config, self.train, self.ranks, self.numbers.largest, self._bad)
        self.say(line)
        return loader

    @cached_property
    def val_loader(self) -> Loader | None:
        if self.val is None:
            return None
        return make_loader(self.config, self.val, self.ranks, self.numbers.largest, self._bad)[0]

    @cached_property
    def engine(self) -> Engine:
        config, n, e = self.config, self.numbers, self.config.engine
        for line in deviations(config, self.ranks):
            self.say(line)
        model = self._model(self._norm_group()).to(self.ranks.device)
        graphs = uses_graphs(config, self.ranks)
        settings = StepSettings(
            e.precision,
            e.zero,
            config.optim.clip,
            config.optim.momentum,
            e.channels_last,
            graphs,
            e.bucket_mb,
            n.norm_groups > 1,
            e.loss_scale,
        )
        batch = {
            "train_batch_size": n.images,
            "gradient_accumulation_steps": n.micro_steps,
            "train_micro_batch_size_per_gpu": n.largest,
        }
        optimizer = self._optimizer(model)
        engine = make_engine(e.kind, model, optimizer, settings, self.ranks, batch, self._deepspeed_config)
        if e.compile:
            model.compile(dynamic=False, mode="default" if e.compile is True else e.compile)
        return engine

    def _norm_group(self) -> Group | None:
        """The ranks whose views batch norm sees together with this one's."""
        timeout = self.config.run.timeout
        group = neighbours(self.numbers.norm_groups, timeout)
        if group is None or not self.config.engine.symmetric_memory:
            return group
        from fastrot.models.in_node import InNode

        return InNode.of(group, self.ranks.device, timeout)

    @cached_property
    def memory(self) -> Memory:
        return estimate(self.config, self.numbers, self.ranks, self._model(None), self._dtype)

    @cached_property
    def rates(self) -> roofline.Rates:
        return roofline.measure_rates(self.ranks.device, self._dtype)

    @cached_property
    def _work(self) -> dict[int, roofline.Work]:
        """By side of the crops."""
        return {side: self.rates.work(self.step_rows(side)) for side in sides(self.config)}

    def build(self) -> None:
        """Make what a run needs now, so that what is wrong is said before it begins."""
        _ = self.loader, self.val_loader, self.engine, self._work

    def begin_with(self, path: str) -> None:
        """Give the network a backbone's weights; its last layer stays as drawn. Raises UserError."""
        backbone, origin = load_backbone(path)
        if origin.arch != self.config.model.arch:
            raise UserError(f"model.init {path}: is a {origin.arch}; set model.arch={origin.arch}, or name another")
        self.say(f"begins with {origin.says()}")
        model, _, scalars = self.engine.state()
        self.engine.load_state(model | backbone.state_dict(), {}, scalars)

    def make_task(self) -> Task:
        """What is learnt; another job learns another thing."""
        return RotationTask(
            [255 * v for v in self.config.data.mean],
            [255 * v for v in self.config.data.std],
            self._dtype,
            self.ranks.device,
            self.config.rotation.shuffle_labels,
            self.config.engine.stem_channels,
        )

    def network(self, over_ranks: Group | None) -> torch.nn.Module:
        """What the config trains, on the CPU; over_ranks: batch norm over their views."""
        model = self.task.build_model(self.config.model.arch, self.config.run.seed)
        return fitted(model, self.config, over_ranks)

    def _model(self, over_ranks: Group | None) -> torch.nn.Module:
        """The network as it is trained, on the CPU."""
        model = self.network(over_ranks)
        return recompute_blocks(model) if self.config.engine.recompute else model

    def _optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        o = self.config.optim
        return build_optimizer(
            o.name,
            model,
            lr=o.lr,
            momentum=o.momentum,
            nesterov=o.nesterov,
            weight_decay=o.weight_decay,
            decay_norms=o.decay_norms,
            head_rate=self.head_rate,
            trust=o.trust,
            fused=self.config.engine.precision != "fp16",
        )

    @property
    def _dtype(self) -> torch.dtype:
        """Of the views and of the network's maps."""
        return AUTOCAST.get(self.config.engine.precision, torch.float32)

    def step_rows(self, side: int) -> list[roofline.Row]:
        """The operations of this rank's share of a step on crops of `side`; another job counts none."""
        n = self.numbers
        images = math.ceil(n.images / n.ranks)
        build = partial(self.network, over_ranks=None)  # nothing is communicated where nothing is computed
        return roofline.step_rows(build, images * n.views_per_image, images, side, self._dtype)

    def work_of(self, epoch: float) -> roofline.Work:
        """What a step at `epoch` asks of this rank's device."""
        return self._work[crop_at(self.config, epoch)]

    def lr_of(self, epoch: float) -> float:
        return rate_at(self.config, len(self.train), epoch)

    def batches(self, steps: range, position: int) -> Generator[StepBatch, None, None]:
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
            run_.evaluate_every_steps,
            run_.seed,
            self.ranks.rank,
            tuple(peer.host for peer in self.ranks.peers),
            self.config.engine.max_bad_steps,
        )

    def evaluate(self) -> dict[str, float]:
        """Held-out loss and accuracies over all ranks, exact for any number of them."""
        loader = self.val_loader
        assert loader is not None, "there are no held-out images"
        self.engine.train(False)
        batches = loader.held_out(
            self.ranks.world, self.ranks.rank, self.numbers.largest, short_side(self.config), self.config.data.crop
        )
        sums = self.engine.reduce(self.task.evaluate(self.engine.module, batches))
        self.engine.train(True)
        return {f"held_out_{name}": value for name, value in self.task.summary(sums).items()}

    def bad_images(self) -> int:
        """Images replaced so far, of both sets, which may be the same."""
        return sum({one.manifest.source: one.bad_images for one in (self.loader, self.val_loader) if one}.values())

    def close(self) -> None:
        """End the loaders that were made."""
        for name in ("loader", "val_loader"):
            if loader := self.__dict__.get(name):
                loader.close()
