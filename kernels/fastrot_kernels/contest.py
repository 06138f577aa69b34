"""Which backend is the fastest on this GPU: measured once a kind of GPU, kept in the cache."""

import hashlib
import json
import statistics
import textwrap
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from fastrot_kernels.build import cache_folder, make
from fastrot_kernels.layout import Crops

IMAGES, SIDE, VIEWS = 128, 224, 4  # bfloat16 views of 154 MB: more than the caches hold
ROUNDS, LAUNCHES = 5, 4


def times(backends: dict[str, Callable[[Crops], Tensor]], device: torch.device) -> dict[str, float]:
    """Median milliseconds of each backend on the same batch, in alternating rounds.

    Not while a CUDA graph is captured: call once before.
    """
    kept = cache_folder() / f"contest-{_key(sorted(backends), device)}.json"
    make(
        kept,
        "timing the kernels that make views (a second)",
        lambda scratch: scratch.write_text(json.dumps(_measured(backends, device))),
    )
    known: dict[str, float] = json.loads(kept.read_text())
    return known


def obstacle(rotate_views: Callable[[Crops], Tensor], device: torch.device) -> str:
    """Why a backend does not compile or launch on this GPU, found by doing it; empty if it does."""
    try:
        rotate_views(_crops(1, 32, device))
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # the device's own, no compiler's
    except Exception as error:  # Triton's, its C compiler's and the driver's have no class in common
        return f"cannot be compiled and run ({type(error).__name__}: {textwrap.shorten(str(error), 200)})"
    return ""


def _key(names: list[str], device: torch.device) -> str:
    """Hash of all that a timing depends on: GPU, compilers, and the kernels themselves."""
    parts = [names, torch.cuda.get_device_name(device), torch.__version__, version("triton")]
    here = Path(__file__).parent
    sources = [file.read_bytes() for file in sorted((*here.glob("*_views.py"), *here.glob("views/*")))]
    return hashlib.sha256(repr((parts, sources)).encode()).hexdigest()[:16]


def _measured(backends: dict[str, Callable[[Crops], Tensor]], device: torch.device) -> dict[str, float]:
    crops = _crops(IMAGES, SIDE, device)
    rounds: dict[str, list[float]] = {name: [] for name in backends}
    for _ in range(1 + ROUNDS):  # the first warms up
        for name, rotate_views in backends.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            with torch.cuda.device(device):
                begin.record()
                for _ in range(LAUNCHES):
                    rotate_views(crops)
                end.record()
                end.synchronize()
            rounds[name].append(begin.elapsed_time(end) / LAUNCHES)
    return {name: statistics.median(ms[1:]) for name, ms in rounds.items()}


def _crops(images: int, side: int, device: torch.device) -> Crops:
    """Black images, every other one flipped, as views of bfloat16."""
    x = torch.zeros(images, side, side, 3, dtype=torch.uint8, device=device)
    flips = torch.arange(images, device=device).to(torch.uint8) % 2
    turns = torch.arange(VIEWS, device=device).to(torch.uint8).repeat(images, 1)
    ones = torch.ones(3, device=device)
    return Crops(x, flips, turns, ones, ones, torch.bfloat16, 3)
