"""Jobs on whole images: what detection and segmentation share."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor, nn

from fastrot.config import Config
from fastrot.data.bad_images import BadImages
from fastrot.data.build import plan_of, settings_of
from fastrot.data.manifest import Manifest
from fastrot.data.whole import Movable, WholeLoader, WholeStep
from fastrot.distributed import Ranks
from fastrot.errors import UserError
from fastrot.runs.memory import Memory, estimate
from fastrot.runs.transfer import Start, TransferJob

T = TypeVar("T", bound=Movable)


class Content(Protocol):
    """What is known of a manifest's rows."""

    def __len__(self) -> int: ...

    def content(self) -> str:
        """A hash of all of it."""


K = TypeVar("K", bound=Content)


@dataclass(frozen=True)
class Beside(Generic[K]):
    """What is known of the rows of a manifest whose content is `rows`."""

    rows: str
    known: K


class WholeJob(TransferJob, Generic[T, K]):
    """A job whose images keep their shapes, shown with what is known of them.

    sets  of "train" and "val".  Raises UserError where a run's own manifest no longer is of the images they are of.
    """

    def __init__(
        self,
        begin: Start,
        sets: dict[str, Beside[K]],
        config: Config,
        ranks: Ranks,
        train: Manifest,
        val: Manifest | None,
        *rest: Any,
    ):
        self.sets = sets
        for name, manifest in (("train", train), ("val", val)):
            if manifest is not None and manifest.content != sets[name].rows:
                raise UserError(
                    f"{manifest.source}: lists other images than when this run began; restore them, or choose another run.out"
                )
        super().__init__(begin, config, ranks, train, val, *rest)

    @abstractmethod
    def shown(self, name: str) -> Callable[..., T]:
        """`prepare` of the loader of "train" or "val"."""

    @abstractmethod
    def figures(self) -> dict[str, float]:
        """Held-out figures over all ranks, the network in eval mode. Collective."""

    @abstractmethod
    def maps_of(self, network: nn.Module) -> tuple[nn.Module, int]:
        """The part of the network that holds most of a step's memory: images -> maps; and the side of a square image
        with as many pixels as the largest."""

    @cached_property
    def whole(self) -> WholeLoader[T]:
        return self._loader(self.train, "train")

    @cached_property
    def val_whole(self) -> WholeLoader[T]:
        assert self.val is not None
        return self._loader(self.val, "val")

    def _loader(self, manifest: Manifest, name: str) -> WholeLoader[T]:
        data, settings = self.config.data, settings_of(self.config, self.ranks)
        most = data.max_bad if data.max_bad is not None else max(10, len(manifest) // 1000)
        bad = BadImages(self._bad, manifest.source, most)
        order = plan_of(self.config, manifest).order
        shown = self.shown(name)
        return WholeLoader(manifest, order, shown, bad, settings.threads, settings.prefetch, data.timeout)

    @cached_property
    def memory(self) -> Memory:
        network = self._model(None)
        maps, side = self.maps_of(network)
        data = self.config.data.model_copy(update={"crop": side, "crop_by_epoch": {}})
        config = self.config.model_copy(update={"data": data})
        return estimate(config, self.numbers, self.ranks, Averaged(network, maps), self._dtype)

    def build(self) -> None:
        _ = self.whole, self.engine, self._work
        if self.val is not None:
            _ = self.val_whole

    def batches(self, steps: range, position: int) -> Iterator[WholeStep[T]]:  # type: ignore[override]  # whole images
        n = self.numbers
        return self.whole.train(steps, position, n.images, n.ranks, self.ranks.rank, n.micro_steps)

    def evaluate(self) -> dict[str, float]:
        """Held-out figures over all ranks, exact for any number of them."""
        self.engine.train(False)
        figures = self.figures()
        self.engine.train(True)
        return {f"held_out_{name}": value for name, value in figures.items()}

    def bad_images(self) -> int:
        made = [self.__dict__[name] for name in ("whole", "val_whole") if name in self.__dict__]
        return sum({one.manifest.source: one.bad_images for one in made}.values())

    def close(self) -> None:
        for name in ("whole", "val_whole"):
            if loader := self.__dict__.get(name):
                loader.close()


class Averaged(nn.Module):
    """A network whose maps alone are computed, and averaged to [n, C]: what the estimate of memory traces."""

    def __init__(self, network: nn.Module, maps: nn.Module):
        super().__init__()
        self.network, self.maps = network, maps

    def forward(self, images: Tensor) -> list[Tensor]:
        out = self.maps(images)
        maps = out.values() if isinstance(out, dict) else out if isinstance(out, tuple) else (out,)
        return [one.mean((2, 3)) for one in maps]
