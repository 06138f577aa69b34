"""What `import fastrot` offers beside the loader: a source opened, a backbone read, trained and looked through."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn
from torchvision.models import ResNet

from fastrot import config as configs
from fastrot import terminal
from fastrot.commands.base import among_ranks, with_precision
from fastrot.data.index import in_cache
from fastrot.data.manifest import Manifest
from fastrot.distributed import Ranks
from fastrot.errors import UserError
from fastrot.features.extract import in_memory, parse_taps
from fastrot.models import backbone as backbones
from fastrot.models.taps import POOLS
from fastrot.probes.progress import silent
from fastrot.runs.build import torch_flags_kept
from fastrot.runs.run import train

_TRANSFORMS = ("test", "svm")


def open(source: str | os.PathLike[str], max_pixels: int = 178_000_000, show: bool = False) -> Manifest:
    """The images of a source: which there are, where they lie, how large they are, what their labels are.

    source      a folder of class folders, list:FILE, tar shards, NAME.beton, voc:ROOT?split=S, coco:..., as data.train.
    max_pixels  larger images are left out.    show: progress, on standard error.
    Looked at once, in parallel, then found in the cache ($FASTROT_CACHE) until the source changes. What is no sound
    image is no row: it is listed in `quarantined`. Raises UserError where there is nothing to read; Fault where a disk
    fails.
    """
    track = terminal.track if show else silent
    return Manifest.load(in_cache(os.fspath(source), max_pixels, "source", track))


def load_backbone(path: str | os.PathLike[str]) -> nn.Module:
    """A ResNet in eval mode of a checkpoint's weights, fp32 on the CPU, frozen, whose `fc` is the identity.

    path  a run folder, a checkpoint, or any ResNet's .safetensors or .pth, in torchvision's, timm's, MMPretrain's,
          VISSL's or MoCo's names. Nothing in the file executes.
    Raises UserError where the file is unreadable or a key of the backbone is missing, unknown or of another shape.
    """
    model: nn.Module = backbones.load_backbone(os.fspath(path))[0]
    return model


def pretrain(
    config: configs.Config | str | os.PathLike[str] | None = None,
    show: bool = False,
    resume: str = "auto",
    **overrides: Any,
) -> dict[str, Any]:
    """Pretrain by predicting rotations, or go on with it, in run.out, as `fastrot train` does. Returns how it ended.

    config     a YAML file, a config, or None for the defaults.    show: what the command would print.
    resume     auto, never, or a checkpoint or run folder.
    overrides  keys with other values: pretrain("configs/in1k.yaml", **{"data.train": "/data", "optim.lr": 0.1}).
    Under a launcher (torchrun, deepspeed) every rank calls it. torch's flags are as before at its end.
    Raises UserError; Fault where the run cannot go on.
    """
    if dist.is_available() and dist.is_initialized():
        raise UserError(
            "pretrain starts a process group, and this process has one; call destroy_process_group() before"
        )
    given = configs.flat(config) if isinstance(config, configs.Config) else {}
    path = None if config is None or given else os.fspath(config)  # type: ignore[arg-type]  # given is never empty
    settings = configs.from_values(path, given | overrides, "train")
    with torch_flags_kept(), terminal.speaking(show), among_ranks() as ranks:
        return train(with_precision(settings), ranks, resume, [], None)


def extract(
    backbone: ResNet,
    manifest: Manifest,
    taps: Sequence[str] = ("feature4", "feature5"),
    pool: str = "specified",
    transform: str = "test",
    **options: Any,
) -> dict[str, NDArray[np.float32]]:
    """{tap: float32 [N, D]}: what a backbone, on the device where it lies, makes of each row of a manifest.

    taps       of feature1 ... feature5 (the stem and the four stages) and avg, stage 4's global average.
    pool       specified: the protocol's, for crops of 224; gap: the global average; adaptive: for any crop.
    transform  test: short side 256, centre 224; svm: short side 256, then squashed to 224.
    options    keys of the config's section `data`, such as crop, decode, threads.
    All in memory; `fastrot features` writes to disk. Labels are `manifest.label`. Raises UserError, also where an image
    cannot be read: another's features are not its own.
    """
    for name, value, known in (("pool", pool, POOLS), ("transform", transform, _TRANSFORMS)):
        if value not in known:
            raise UserError(f"{name} {value!r}: expected one of {', '.join(known)}")
    names = parse_taps(",".join(taps))
    settings = configs.from_values(None, {f"data.{name}": value for name, value in options.items()})
    device = next(backbone.parameters()).device
    was_training = backbone.training
    try:
        return in_memory(backbone.eval(), manifest, names, pool, transform, settings, Ranks(0, 1, 0, 1, device))
    finally:
        backbone.train(was_training)
