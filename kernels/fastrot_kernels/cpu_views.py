"""Rotated views on the CPU, in C: every source byte is read once, every thread works on images of its own."""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from fastrot_kernels.build import BuildError, library
from fastrot_kernels.layout import Crops, channels_first


@functools.cache
def _library() -> ctypes.CDLL:
    made = library(Path(__file__).parent / "views", "views")
    made.rotate_views.argtypes = [*5 * [ctypes.c_void_p], ctypes.c_int64, *6 * [ctypes.c_int]]
    return made


def obstacle(device: torch.device) -> str:
    """Why this backend cannot run on such a device; empty if it can."""
    if device.type != "cpu":
        return f"tensors are on {device.type}, not the CPU"
    try:
        _library()
    except BuildError as error:
        return str(error)
    return ""


def rotate_views(crops: Crops) -> Tensor:
    """As `reference.rotate_views`, bit for bit, on at most torch.get_num_threads() threads.

    A byte has 256 values: their quotients are rounded to dtype by torch, and looked up in C.
    """
    x, flips, turns, mean, std, dtype, channels = crops
    out = crops.empty_views()
    table = ((torch.arange(256).float() - mean[:, None]) / std[:, None]).to(dtype)  # [C, 256]
    n, side, _, in_channels = x.shape
    inputs = [t.contiguous() for t in (x, flips, turns, table)]
    failed = _library().rotate_views(
        *(t.data_ptr() for t in (*inputs, out)),
        n,
        side,
        in_channels,
        channels,
        turns.shape[1],
        dtype.itemsize,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"no memory for two normalised images of {side} x {side} a thread")
    return channels_first(out)
