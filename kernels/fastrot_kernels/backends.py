"""The backends of `rotate_views`: what there is, what can run where, which one 'auto' takes."""

import functools
import importlib
import logging
from typing import Protocol, cast

import torch
from torch import Tensor

from fastrot_kernels import contest
from fastrot_kernels.layout import Crops

log = logging.getLogger(__name__)


class Backend(Protocol):
    """A module of these functions. It is imported when first chosen: a machine without Triton can use the others."""

    def obstacle(self, device: torch.device, /) -> str:
        """Why this backend cannot run on such a device; empty if it can."""

    def rotate_views(self, crops: Crops) -> Tensor:
        """The views, channels-last, on x's device, within 1 ulp of `reference.rotate_views`."""


BACKENDS = {
    "reference": "fastrot_kernels.reference",
    "numpy": "fastrot_kernels.numpy_views",
    "cpu": "fastrot_kernels.cpu_views",
    "triton": "fastrot_kernels.triton_views",
    "cuda": "fastrot_kernels.cuda_views",
}
# What 'auto' looks at, by device: on the CPU the first that runs, on a GPU the fastest as measured.
CANDIDATES = {"cpu": ("cpu", "numpy"), "cuda": ("cuda", "triton")}


def load(name: str) -> Backend:
    """The module of a backend."""
    return cast(Backend, importlib.import_module(BACKENDS[name]))


def obstacle(name: str, device: torch.device) -> str:
    """Why this backend cannot run on such a device; empty if it can."""
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is unknown; choose auto or one of {', '.join(BACKENDS)}")
    try:
        return load(name).obstacle(device)
    except ImportError as error:
        return f"{name} cannot be imported ({error})"


def runnable_backends(device: torch.device) -> list[str]:
    """Names of the backends that can run on such a device."""
    return [name for name in BACKENDS if not obstacle(name, device)]


@functools.cache
def choose(name: str, device: torch.device) -> tuple[str, str]:
    """(backend, reason) for a requested name, 'auto' included.

    Raises  ValueError for an unknown name, RuntimeError if a named backend cannot run here.
    """
    if name != "auto":
        if why_not := obstacle(name, device):
            raise RuntimeError(f"backend {name!r} cannot run: {why_not}; choose another or auto")
        return name, "named by the caller"
    chosen = _automatic(device)
    log.info("rotate_views: backend %s (%s)", *chosen)
    return chosen


def _automatic(device: torch.device) -> tuple[str, str]:
    candidates = CANDIDATES.get(device.type, ())
    obstacles = {name: obstacle(name, device) for name in candidates}
    if device.type == "cuda":
        for name in [name for name in candidates if not obstacles[name]]:
            obstacles[name] = contest.obstacle(load(name).rotate_views, device)
    able = [name for name in candidates if not obstacles[name]]
    missing = "; ".join(f"{name}: {why}" for name, why in obstacles.items() if why)
    if not able:
        return "reference", missing or f"no kernel for {device.type}"
    if device.type == "cuda" and len(able) > 1:
        times = contest.times({name: load(name).rotate_views for name in able}, device)
        fastest = min(times, key=times.__getitem__)
        others = ", ".join(f"{name} {ms:.3f} ms" for name, ms in times.items() if name != fastest)
        return fastest, f"{times[fastest]:.3f} ms for {contest.IMAGES} images, {others}, measured on this GPU"
    return able[0], missing or f"the fastest for {device.type} tensors"


def run(name: str, crops: Crops) -> Tensor:
    """Run the chosen backend."""
    return load(choose(name, crops.x.device)[0]).rotate_views(crops)
