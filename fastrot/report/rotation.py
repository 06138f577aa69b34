"""The pretraining's own task on held-out images: which turns are told apart, and pictures of it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from fastrot import config as configs
from fastrot.config import Config
from fastrot.data.build import make_loader, open_manifest, short_side
from fastrot.data.manifest import Manifest
from fastrot.distributed import Ranks
from fastrot.errors import UserError
from fastrot.models.backbone import Origin, checkpoint_of
from fastrot.models.resnet import TURNS
from fastrot.report import pictures
from fastrot.report.significance import Figure, accuracy, over
from fastrot.tasks.rotation import RotationTask

_IMAGES = 64  # a batch
_SHOWN = 6  # images


@dataclass(frozen=True)
class View:
    """One turned image: its picture, its turn and the turn predicted, 0 .. 3 quarter turns counter-clockwise."""

    uri: str
    turn: int
    said: int


@dataclass(frozen=True)
class Told:
    """counts int64 [true turn, predicted turn]; overall: over images, whose views are not independent."""

    counts: NDArray[np.int64]
    overall: Figure
    shown: list[list[View]]

    @property
    def shares(self) -> list[list[float]]:
        """Rows that sum to 1."""
        shares: list[list[float]] = (self.counts / self.counts.sum(1, keepdims=True)).tolist()
        return shares

    @property
    def by_turn(self) -> list[Figure]:
        return [accuracy(int(row[turn]), int(row.sum())) for turn, row in enumerate(self.counts)]


def told(origin: Origin, ranks: Ranks) -> Told | None:
    """Judge every held-out image of the run; None where there are none, or where it learnt other classes."""
    step = checkpoint_of(origin)
    weights = step and step / "model.safetensors"
    if origin.run is None or weights is None or not weights.exists():
        return None
    config = configs.load(str(Path(origin.run) / "config.yaml"), [])[0]
    try:
        manifest = open_manifest(config.data.val, config, ranks, "data.val")
    except UserError:
        return None  # trained without held-out images, or they are gone
    mean, std = ([255 * v for v in values] for values in (config.data.mean, config.data.std))
    task = RotationTask(mean, std, torch.float32, ranks.device)
    model = task.build_model(config.model.arch, 0)
    state = load_file(weights)
    if {name: value.shape for name, value in state.items()} != {n: v.shape for n, v in model.state_dict().items()}:
        return None
    model.load_state_dict(state)
    model.to(ranks.device, memory_format=torch.channels_last).eval()
    return _judged(model, task, config, manifest, ranks)


def _judged(model: torch.nn.Module, task: RotationTask, config: Config, manifest: Manifest, ranks: Ranks) -> Told:
    loader, _ = make_loader(config, manifest, ranks, _IMAGES, None)
    wanted = set(np.linspace(0, len(manifest) - 1, _SHOWN).round().astype(int).tolist())
    counts, right, shown = np.zeros((TURNS, TURNS), np.int64), [], []
    first = 0
    with torch.inference_mode():
        for batch in loader.held_out(1, 0, _IMAGES, short_side(config), config.data.crop):
            said = model(task.views(batch.to(ranks.device))).argmax(1).cpu().view(batch.turns.shape).numpy()
            turns = batch.turns.numpy()
            np.add.at(counts, (turns, said), 1)
            right.append(100 * (turns == said).mean(1))
            for at in sorted(wanted & set(range(first, first + len(turns)))):
                image = batch.pixels[at - first].cpu().numpy()
                shown.append(
                    [
                        View(pictures.thumbnail(np.rot90(image, turn)), int(turn), int(guess))
                        for turn, guess in zip(turns[at - first], said[at - first], strict=True)
                    ]
                )
            first += len(turns)
    loader.close()
    return Told(counts, over(np.concatenate(right)), shown)
