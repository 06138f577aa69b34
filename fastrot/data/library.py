"""The loader for a loop of your own: `fastrot.Loader`."""

import logging
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastrot import config as configs
from fastrot.data.build import crop_at, make_loader, short_side
from fastrot.data.loader import Loader as Engine
from fastrot.data.loader import MicroBatch
from fastrot.data.manifest import Manifest
from fastrot.distributed import Ranks
from fastrot.errors import UserError
from fastrot_kernels import rotate_views

_log = logging.getLogger("fastrot")
_log.addHandler(logging.NullHandler())  # nothing is printed unless its user says where to
logging.getLogger("fastrot_kernels").addHandler(logging.NullHandler())
_ENDLESS = 1 << 40  # steps


@dataclass(frozen=True)
class Batch:
    """This rank's share of a step.

    pixels  uint8 [n, S, S, 3] on the device: crops, RGB, upright and not yet flipped.
    labels  int64 [n] on the device, -1 = none; or int8 [n, 20] where an image has many (1 present, 0 absent, -1 ignored).
    rows    int64 [n], numpy: of the manifest, as shown: where an image could not be read, that of its replacement.
    flips   uint8 [n] on the device; 1 = to be mirrored left-right.
    turns   uint8 [n, V] on the device: quarter turns counter-clockwise; all 0, and V = 1, where `views` is None.
    epoch   how often the images were gone through at the step's start: 3.25 is a quarter into the fourth epoch.
    step    from 0.
    mean, std  float32 [3] on the device, on the 0..255 scale.
    """

    pixels: Tensor
    labels: Tensor
    rows: NDArray[np.int64]
    flips: Tensor
    turns: Tensor
    epoch: float
    step: int
    mean: Tensor
    std: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def normalised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What a network is fed: flipped, turned, (pixels - mean) / std; [n * V, 3, S, S], channels-last.

        dtype  float32, float16 or bfloat16. View v of image i is row i * V + v.
        """
        return rotate_views(self.pixels, self.flips, self.turns, self.mean, self.std, dtype)


_Make = Callable[[MicroBatch, float, int], Batch]  # (share, epoch, step)


class Loader:
    """The images of a manifest in the exact order of a seed: an endless stream, of which a `for` takes one epoch.

    images  a step, over all ranks.    crop    side of a crop, pixels.
    seed    of the order and of every crop, flip and turn; nothing else draws.
    rank, ranks  this process among those that share each step; slices differ by one image at most.
    device  of the batches; default: the GPU, else the CPU.
    decode  auto, dali, turbo, turbo_fast, ffcv, nvimgcodec or torch.
    views   None: images as they are, for supervised training; "all": four turns of each; "one": a random turn of each.
    bad_images  a file, one for all ranks, that lists what could not be read or decoded; default: counted alone.
    options any other key of the config's section `data`, such as flip, scale, ratio, threads, prefetch, max_bad, mean.

    A step is a function of (manifest, seed, options, position): the same for any number of ranks and threads. An image
    that cannot be read is replaced by the next that can. A new `for` goes on where the last one stopped, after a `break` too.
    Reading runs ahead in threads, which end with `close`, `with`, or the loader itself.
    Raises UserError for what cannot be; while iterating, Fault where more than max_bad images are bad or nothing comes
    for `timeout` seconds.
    """

    def __init__(
        self,
        manifest: Manifest,
        images: int = 256,
        crop: int = 224,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        device: torch.device | str | int | None = None,
        decode: str = "auto",
        views: str | None = None,
        bad_images: str | Path | None = None,
        **options: Any,
    ):
        if sets := {"train", "val"} & options.keys():
            raise UserError(f"data.{min(sets)}: the loader's images are those of its manifest")
        values = {"crop": crop, "decode": decode} | options
        keys = {f"data.{name}": value for name, value in values.items()}
        keys |= {
            "run.seed": seed,
            "optim.images_per_step": images,
            "rotation.views": views or "all",
        }  # "all" draws nothing
        self._config = configs.from_values(None, keys)
        if not 0 <= rank < ranks <= images:
            raise UserError(f"rank {rank} of {ranks} with images={images}: expected 0 <= rank < ranks <= images")
        self.manifest, self.images = manifest, images
        local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or ranks
        self._ranks = Ranks(rank, ranks, rank, int(local), _device(device))
        self._make = _maker(self._config, self._ranks.device, views is not None)
        self._bad = Path(bad_images) if bad_images is not None else None
        self._position = 0
        self._flow: Generator[Batch, None, None] | None = None
        self._engine: Engine | None = None
        self._process = os.getpid()

    def __len__(self) -> int:
        """Steps that begin in the epoch that is being gone through: rows / images, rounded down or up."""
        n, epoch = len(self.manifest), self._position // len(self.manifest)
        return -(-(epoch + 1) * n // self.images) - -(-epoch * n // self.images)

    @property
    def position(self) -> int:
        """Images of the stream, over all ranks, that were taken: those of the batch in hand too."""
        return self._position

    @property
    def epoch(self) -> float:
        """How often the images were gone through: position / rows."""
        return self._position / len(self.manifest)

    @property
    def bad_images(self) -> int:
        """Images that could not be read or decoded and were replaced, since the threads began or as listed."""
        return self._engine.bad_images if self._engine else 0

    def __iter__(self) -> Iterator[Batch]:
        """The steps that begin before the epoch ends."""
        end = (self._position // len(self.manifest) + 1) * len(self.manifest)
        while self._position < end:
            yield self._next()

    def held_out(self) -> Iterator[Batch]:
        """This rank's share of all rows, each once and in order, as evaluation shows them: short side resized to
        crop * 256 / 224, the centre cropped, no flip, and all four turns where there are `views`. The stream stays
        where it is."""
        config, ranks = self._config, self._ranks
        engine = self._opened()
        shown = engine.held_out(ranks.world, ranks.rank, self._largest, short_side(config), config.data.crop)
        with closing(engine), closing(shown) as shares:
            for step, micro in enumerate(shares):
                yield self._make(micro, 0.0, step)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: `position`, and of what images and seed. JSON values alone; the same on all ranks."""
        return {"position": self._position, "content": self.manifest.content, "seed": self._config.run.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, at any number of ranks; `position` alone will do. Raises UserError where the state is of
        other images or of another seed."""
        position, here = state.get("position"), self.state_dict()
        if not isinstance(position, int) or position < 0:
            raise UserError(f"the loader's state has position {position!r}; expected a number of images")
        for name in ("content", "seed"):
            if state.get(name, here[name]) != here[name]:
                raise UserError(
                    f"the loader's state has {name} {state[name]}, not {here[name]}: it is of another stream"
                )
        self.close()
        self._position = position

    def close(self) -> None:
        """End the threads; a new `for` starts them again."""
        flow, self._flow, self._engine = self._flow, None, None
        if flow is not None:
            flow.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def _largest(self) -> int:
        """Images of the largest share of a step."""
        return -(-self.images // self._ranks.world)

    def _next(self) -> Batch:
        if self._flow is None:
            self._process, self._engine = os.getpid(), self._opened()
            self._flow = _flow(self._engine, self._config, self._ranks, self._position, self._make)
        elif os.getpid() != self._process:
            raise UserError(
                f"this process was forked from process {self._process}, whose threads fill the loader; make a Loader here"
            )
        try:
            batch = next(self._flow)
        except BaseException:  # what raised has ended: the next `for` begins anew, at the same position
            self.close()
            raise
        self._position += self.images
        return batch

    def _opened(self) -> Engine:
        engine, line = make_loader(self._config, self.manifest, self._ranks, self._largest, self._bad)
        _log.info("%s", line)
        return engine


def _flow(
    engine: Engine, config: configs.Config, ranks: Ranks, position: int, make: _Make
) -> Generator[Batch, None, None]:
    """One rank's shares of the stream from a position on; at its end the engine's threads end.

    Apart from the Loader, so that no cycle keeps the threads of one that is dropped."""
    images, process = config.optim.images_per_step, os.getpid()
    first = position // images
    steps = engine.train(
        range(first, first + _ENDLESS), position, images, ranks.world, ranks.rank, 1, partial(crop_at, config)
    )
    try:
        with closing(steps):
            for step in steps:
                for micro in step.micro_steps:
                    yield make(micro, step.epoch, step.step)
    finally:
        if os.getpid() == process:  # a forked child has no such threads
            engine.close()


def _maker(config: configs.Config, device: torch.device, turned: bool) -> _Make:
    """A function that makes a Batch on the device. turned: whether its views are turned, else they are shown upright."""
    mean, std = (255 * torch.tensor(v, dtype=torch.float32, device=device) for v in (config.data.mean, config.data.std))

    def make(micro: MicroBatch, epoch: float, step: int) -> Batch:
        labels = torch.from_numpy(micro.labels)
        if device.type == "cuda":
            labels = labels.pin_memory()
        micro, labels = micro.to(device), labels.to(device, non_blocking=True)
        turns = micro.turns if turned else torch.zeros_like(micro.turns[:, :1])
        return Batch(micro.pixels, labels, micro.sample.rows, micro.flips, turns, epoch, step, mean, std)

    return make


def _device(asked: torch.device | str | int | None) -> torch.device:
    """The device asked for, by default a GPU where there is one. Raises UserError."""
    here = torch.cuda.is_available()
    try:
        device = torch.device(asked if asked is not None else "cuda" if here else "cpu")
    except RuntimeError as error:
        raise UserError(f"device {asked!r}: {str(error).splitlines()[0]}") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {asked!r}: batches go to cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {asked!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device
