"""Moments, by the host's clock or in a GPU's queue, without a host sync; and memory."""

import resource
import time

import torch

Mark = float | torch.cuda.Event


def mark() -> Mark:
    """This moment; on a GPU, when it comes to it."""
    if not torch.cuda.is_initialized():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(begin: Mark, end: Mark) -> float:
    """Seconds; of a GPU's moments once it has come to both."""
    if isinstance(begin, float) or isinstance(end, float):
        return float(end) - float(begin)  # type: ignore[arg-type]  # both are, or neither
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds / 1e3


def memory_gib() -> float:
    """The most that was held: of a GPU's, where there is one, else by this process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
