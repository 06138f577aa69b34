"""The backends of `rotate_views`: what there is, what can run where, which one 'auto' takes."""

import functools
import importlib
import logging
from collections.abc import Callable

import torch
from torch import Tensor

log = logging.getLogger(__name__)

# Modules are imported when first chosen: a machine without Triton can still use the others.
BACKENDS = {
    "reference": "fastrot_kernels.reference",
    "cpu": "fastrot_kernels.cpu_views",
    "triton": "fastrot_kernels.triton_views",
}


def load(name: str) -> Callable[..., Tensor]:
    """The function of a backend: (x, flips, turns, mean, std, dtype, C') -> views."""
    return importlib.import_module(BACKENDS[name]).rotate_views


def obstacle(name: str, device_type: str) -> str:
    """Why this backend cannot run on such a device; empty if it can."""
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is unknown; choose auto or one of {', '.join(BACKENDS)}")
    if name == "cpu" and device_type != "cpu":
        return f"tensors are on {device_type}, not the CPU"
    if name == "triton":
        try:
            triton_views = importlib.import_module(BACKENDS[name])
        except ImportError as error:
            return f"triton cannot be imported ({error})"
        if device_type != "cuda" and not triton_views.INTERPRETED:
            return f"tensors are on {device_type}, not CUDA, and TRITON_INTERPRET=1 was not set"
    return ""


def runnable_backends(device_type: str) -> list[str]:
    """Names of the backends that can run on such a device."""
    return [name for name in BACKENDS if not obstacle(name, device_type)]


@functools.cache
def choose(name: str, device_type: str) -> tuple[str, str]:
    """(backend, reason) for a requested name, 'auto' included.

    Raises  ValueError for an unknown name, RuntimeError if a named backend cannot run here.
    """
    if name != "auto":
        if why_not := obstacle(name, device_type):
            raise RuntimeError(f"backend {name!r} cannot run: {why_not}; choose another or auto")
        return name, "named by the caller"

    fastest = {"cpu": "cpu", "cuda": "triton"}.get(device_type)
    if fastest is None:
        chosen = "reference", f"no kernel for {device_type}"
    elif why_not := obstacle(fastest, device_type):
        chosen = "reference", why_not
    else:
        chosen = fastest, f"the fastest for {device_type} tensors"
    log.info("rotate_views: backend %s (%s)", *chosen)
    return chosen


def run(name: str, x: Tensor, *arguments: Tensor | torch.dtype | int) -> Tensor:
    """Run the chosen backend on checked arguments."""
    return load(choose(name, x.device.type)[0])(x, *arguments)
