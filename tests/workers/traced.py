"""Before its first step a run traces its network twice and times the device, which is most of what a small run costs: here
once for each network, and for the device, in all of a session's processes."""

import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import torch

from fastrot.profiling import roofline
from fastrot.runs import estimate, memory


def structure(model: torch.nn.Module) -> str:
    """All of a network that a trace of it depends on."""
    plain = (bool, int, float, str, tuple, type(None))
    modules = [
        (name, [kind.__qualname__ for kind in type(module).__mro__], "forward" in vars(module),
         {key: value for key, value in vars(module).items() if isinstance(value, plain)})
        for name, module in model.named_modules()
    ]  # fmt: skip
    return repr((modules, [(name, p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()]))


def turn_on(folder: Path, put: Callable = setattr) -> None:
    """What was found lies in the folder; put(module, name, value) sets a module's function."""
    for module in (memory, estimate):
        put(module, "peak_of_step", _once(folder, module.peak_of_step, structure))
    put(roofline, "step_rows", _once(folder, roofline.step_rows, _built))
    put(roofline, "measure_rates", _once(folder, roofline.measure_rates, str))


def _built(build: Callable[[], torch.nn.Module]) -> str:
    with torch.device("meta"):
        return structure(build())


def _once(folder: Path, work: Callable, key_of: Callable) -> Callable:
    def once(first, *rest):
        key = repr((work.__name__, key_of(first), rest))
        found = folder / hashlib.sha256(key.encode()).hexdigest()
        if not found.exists():
            written = found.with_suffix(f".{os.getpid()}")
            written.write_bytes(pickle.dumps(work(first, *rest)))
            written.replace(found)
        return pickle.loads(found.read_bytes())

    return once
