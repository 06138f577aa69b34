"""What is timed, each behind a gate: equal to its reference, or it has no figure.

A part is a group of arms (a decoder, a backend, a peer). Each arm runs in a process of its own, see `rounds`.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from fastrot.config import Config, flat, from_values
from fastrot.data.build import make_loader
from fastrot.data.decode import DECODERS, STATED
from fastrot.data.loader import MicroBatch
from fastrot.data.manifest import Manifest
from fastrot.distributed import Ranks
from fastrot.errors import UserError
from fastrot.models.resnet import TURNS, build_model
from fastrot.probes import knn
from fastrot.profiling.stages import LAPS, ceiling
from fastrot.runs.arithmetic import arithmetic
from fastrot.runs.build import Job
from fastrot.runs.subject import Training
from fastrot_kernels import backends, rotate_views

# of the last layer's gradient, that the configured arithmetic may move it
_NEAR = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.1}
_CHECKED = 2  # steps
_WRITTEN = {"cpu": 2**27, "cuda": 2**30}  # bytes of views a call: above the caches
_PEER = "torchvision DataLoader"


class Unequal(Exception):
    """A gate that does not hold; says by how much."""


@dataclass(frozen=True)
class Place:
    """One config on this process's rank. seconds: of timing a round."""

    config: Config
    ranks: Ranks
    manifest: Manifest
    seconds: float

    def alone(self) -> Training:
        """The stages of a training, as `fastrot profile` times them."""
        return Training(Job, self.config, self.ranks, self.manifest)

    def with_(self, **data: object) -> "Place":
        values = flat(self.config) | {f"data.{key}": value for key, value in data.items()}
        return Place(from_values(None, values), self.ranks, self.manifest, self.seconds)

    def batches(self) -> list[MicroBatch]:
        """The first steps of this rank."""
        n = arithmetic(self.config, self.ranks.world, len(self.manifest))
        loader, _ = make_loader(self.config, self.manifest, self.ranks, n.largest, None)
        side = self.config.data.crop
        with closing(loader):
            steps = loader.train(range(_CHECKED), 0, n.images, 1, 0, n.micro_steps, lambda _: side)
            return [micro for step in steps for micro in step.micro_steps]


@dataclass(frozen=True)
class Arm:
    """gate() says what was found equal, or raises Unequal; laps() are in the part's unit. Either raises UserError where
    the arm cannot run here."""

    gate: Callable[[Place], str]
    laps: Callable[[Place], list[float]]


@dataclass(frozen=True)
class Part:
    """unit: of every figure. arms(config, device type) -> those that a machine may have, by name."""

    says: str
    unit: str
    arms: Callable[[Config, str], dict[str, Arm]]


def _decoders(config: Config, device: str) -> dict[str, Arm]:
    names = [name for name in DECODERS if name != "torch"]
    arms = {name: Arm(partial(_same_pixels, name), partial(_loads, name)) for name in names}
    return arms | {_PEER: Arm(_peer, _peer_loads)}


def _loads(decode: str, place: Place) -> list[float]:
    return place.with_(decode=decode).alone().data(place.seconds).paces


def _same_pixels(decode: str, place: Place) -> str:
    got, want = place.with_(decode=decode).batches(), place.with_(decode="torch").batches()
    levels: list[float] = []
    for ours, oracle in zip(got, want, strict=True):
        for field in ("rows", "windows", "flips", "turns"):
            if not np.array_equal(getattr(ours.sample, field), getattr(oracle.sample, field)):
                raise Unequal(f"{field} are not those of the torch decoder")
        levels += (ours.pixels.cpu().float() - oracle.pixels.cpu().float()).abs().mean((1, 2, 3)).tolist()
    mean, worst = float(np.mean(levels)), max(levels)
    said = f"pixels {mean:.3f} levels of 255 from torch's, the worst image {worst:.2f}; stated {STATED[decode]}"
    if mean > STATED[decode][0] or worst > STATED[decode][1]:
        raise Unequal(said)
    return said


def _peer(place: Place) -> str:
    if not Path(str(place.config.data.train)).is_dir():
        raise UserError(f"{place.config.data.train}: {_PEER} reads folders alone")
    return "a peer, with the same law of windows: nothing to be equal to"


def _peer_loads(place: Place) -> list[float]:
    """torchvision as its documentation has it: a process a core, the same windows' law."""
    data = place.config.data
    crop = v2.RandomResizedCrop(data.crop, data.scale, data.ratio, antialias=True)
    images = ImageFolder(data.train, v2.Compose([crop, v2.PILToTensor()]))
    size, workers = min(place.config.optim.images_per_step, len(images)), place.ranks.cores

    def endless() -> Iterator[Tensor]:
        for _ in repeat(None):
            for pixels, _label in DataLoader(images, size, shuffle=True, num_workers=workers, drop_last=True):
                yield pixels

    flow = endless()
    return ceiling(lambda: len(next(flow)), place.seconds).paces


def _backends(config: Config, device: str) -> dict[str, Arm]:
    names = [name for name in backends.runnable_backends(torch.device(device)) if name != "reference"]
    arms = {name: Arm(partial(_same_views, name), partial(_turns, name)) for name in names}
    peer = Arm(lambda place: "a peer: rot90 and normalise, in the order of tutorials", partial(_turns, None))
    return arms | {"plain torch": peer}


def _mean_std(place: Place) -> tuple[Tensor, Tensor]:
    mean, std = (255 * torch.tensor(values) for values in (place.config.data.mean, place.config.data.std))
    return mean.to(place.ranks.device), std.to(place.ranks.device)


def _crops(place: Place, written: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """pixels, flips, turns, mean, std: as many as give so many bytes of views."""
    side, device = place.config.data.crop, place.ranks.device
    n = max(4, written // (TURNS * side * side * 3 * 2))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (n, side, side, 3), dtype=torch.uint8, generator=generator)
    flips = torch.randint(0, 2, (n,), dtype=torch.uint8, generator=generator)
    turns = torch.arange(TURNS, dtype=torch.uint8).repeat(n, 1)
    return pixels.to(device), flips.to(device), turns.to(device), *_mean_std(place)


def _same_views(backend: str, place: Place) -> str:
    crops = _crops(place, 2**22)
    got, want = (rotate_views(*crops, torch.bfloat16, backend=name) for name in (backend, "reference"))
    if not torch.equal(got, want):
        raise Unequal(f"{(got != want).sum():,} of {got.numel():,} values are not the reference's")
    return f"{got.numel():,} values equal to the reference bit for bit"


def _turns(backend: str | None, place: Place) -> list[float]:
    crops = _crops(place, _WRITTEN[place.ranks.device.type])

    def work() -> int:
        views = rotate_views(*crops, torch.bfloat16, backend=backend) if backend else _plain_views(*crops)
        if views.is_cuda:
            torch.cuda.synchronize()
        return len(views)

    return ceiling(work, place.seconds).paces


def _plain_views(pixels: Tensor, flips: Tensor, turns: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    x = pixels.permute(0, 3, 1, 2).float()
    x = torch.where(flips.bool()[:, None, None, None], x.flip(3), x)
    x = (x - mean[:, None, None]) / std[:, None, None]
    views = torch.stack([torch.rot90(x, turn, (2, 3)) for turn in range(TURNS)], 1)
    return views.flatten(0, 1).to(torch.bfloat16, memory_format=torch.channels_last)


def _learns(place: Place) -> str:
    """The gradient of the last layer that the configured step makes, beside a plain fp32 network's."""
    job = Job(place.config, place.ranks, place.manifest, None, None, None, lambda line: None)
    try:
        batch = place.batches()[0].to(place.ranks.device)
        model = build_model(place.config.model.arch, TURNS, place.config.run.seed).to(place.ranks.device)
        mean, std = _mean_std(place)
        views = rotate_views(batch.pixels, batch.flips, batch.turns, mean, std, torch.float32, backend="reference")
        loss = F.cross_entropy(model(views), batch.turns.flatten().long(), reduction="sum") / batch.views_of_step
        (want,) = torch.autograd.grad(loss, model.fc.weight)
        ours, _ = job.task.loss(job.engine.module, job.task.views(batch), batch)
        job.engine.backward(ours, batch.views_of_step, batch.last)
        got = job.engine.model.get_parameter("fc.weight").grad
    finally:
        job.close()
    far = float((got - want).norm() / want.norm()) if got is not None else float("nan")
    said = f"the last layer's gradient {far:.2g} of its norm from a plain fp32 network's"
    if not far < _NEAR[place.config.engine.precision]:
        raise Unequal(f"{said}, more than {_NEAR[place.config.engine.precision]}")
    return said


def _trains(stage: str, place: Place) -> list[float]:
    alone = place.alone()
    found, _ = alone.step(place.seconds) if stage == "step" else alone.both(place.seconds)
    return [TURNS * pace for pace in found.paces]


def _steps(stage: str, config: Config, device: str) -> dict[str, Arm]:
    return {"as configured": Arm(_learns, partial(_trains, stage))}


def _features(rows: int, dims: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    draw = np.random.default_rng(0)
    label = draw.integers(0, 10, rows)
    centres = draw.standard_normal((10, dims)).astype(np.float32)
    return centres[label] + 6 * draw.standard_normal((rows, dims)).astype(np.float32), label


def _seconds(work: Callable[[], object]) -> list[float]:
    laps = []
    for _ in range(LAPS):
        began = time.perf_counter()
        work()
        laps.append(time.perf_counter() - began)
    return laps


def _neighbours(rows: int, place: Place) -> float:
    x, label = _features(rows + rows // 10, 512)
    return float(knn(x[:rows], label[:rows], x[rows:], label[rows:], ks=(20,), device=place.ranks.device.type)[20][0])


def _same_neighbours(place: Place) -> str:
    """Against every distance in float64."""
    rows = 1000
    x, label = _features(rows + rows // 10, 512)
    unit = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    similar = unit[rows:] @ unit[:rows].T
    nearest = np.argsort(-similar, 1)[:, :20]
    weights = np.exp(np.take_along_axis(similar, nearest, 1) / 0.07)
    votes = np.stack([(weights * (label[nearest] == one)).sum(1) for one in range(10)], 1)
    want, got = 100 * float((votes.argmax(1) == label[rows:]).mean()), _neighbours(rows, place)
    if abs(got - want) > 100 / (rows // 10):  # one query
        raise Unequal(f"top-1 {got:.2f}, by every distance in float64 {want:.2f}")
    return f"top-1 {got:.2f}, by every distance in float64 {want:.2f}"


def _probes(config: Config, device: str) -> dict[str, Arm]:
    return {
        "k-NN, 20,000 rows of 512": Arm(_same_neighbours, lambda place: _seconds(partial(_neighbours, 20_000, place))),
    }


PARTS = {
    "load": Part("the data path alone, with each decoder, beside torchvision's", "images/s", _decoders),
    "rotate": Part("the kernel that turns crops into views, beside plain torch", "views/s", _backends),
    "step": Part("the step alone, on a batch that is there", "views/s", partial(_steps, "step")),
    "train": Part("the data path and the step together, as in training", "views/s", partial(_steps, "train")),
    "probes": Part("probes on drawn features", "s", _probes),
}
