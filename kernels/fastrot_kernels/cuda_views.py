"""Rotated views in CUDA C++: compiled for the GPU at hand, launched on torch's current stream."""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from fastrot_kernels.build import BuildError
from fastrot_kernels.layout import Crops, channels_first
from fastrot_kernels.nvrtc import cubin

SOURCE = Path(__file__).parent / "views" / "rotate.cu"
TILE, THREADS = 32, 256  # as in views/tile.h


class Batch(ctypes.Structure):
    """`struct Batch` of views/tile.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "flips", "turns", "mean", "std", "out")),
        ("images", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("side", "views", "in_channels", "channels")),
    )


def obstacle(device: torch.device) -> str:
    """Why this backend cannot run on such a device; empty if it can."""
    if device.type != "cuda":
        return f"tensors are on {device.type}, not CUDA"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    try:
        _module(device.index if device.index is not None else torch.cuda.current_device())
    except BuildError as error:
        return str(error)
    return ""


def kernel_name(side: int, in_channels: int, channels: int, dtype: torch.dtype, aligned: bool) -> str:
    """The kernel for such views; aligned: all memory begins at a multiple of 16 bytes."""
    kind = str(dtype).removeprefix("torch.")
    if in_channels != 3 or channels > 4:
        return f"{kind}_any"
    return f"{kind}_{channels}_{'chunks' if aligned and side % 16 == 0 else 'values'}"


def rotate_views(crops: Crops) -> Tensor:
    """As `reference.rotate_views`, within 1 ulp of dtype."""
    x, flips, turns, mean, std, dtype, channels = crops
    out = crops.empty_views()
    n, side, _, in_channels = x.shape
    if n == 0:
        return channels_first(out)
    inputs = [t.contiguous() for t in (x, flips, turns, mean, std)]
    batch = Batch(*(t.data_ptr() for t in (*inputs, out)), n, side, turns.shape[1], in_channels, channels)
    name = kernel_name(side, in_channels, channels, dtype, batch.x % 16 == 0 and batch.out % 16 == 0)
    blocks = _blocks(n, side, name)
    if blocks >= 2**31:
        raise ValueError(f"{n} images of {side} x {side} are more than a launch has blocks for; use smaller batches")
    with torch.cuda.device_of(x):
        stream = torch.cuda.current_stream().cuda_stream
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(batch))
        kernel = _kernel(name, x.device.index)
        _must(_driver().cuCtxSetCurrent(_context(x.device.index)), "its context")  # a new thread has none
        _must(_driver().cuLaunchKernel(kernel, blocks, 1, 1, THREADS, 1, 1, 0, stream, arguments, None), name)
    return channels_first(out)


def _blocks(n: int, side: int, name: str) -> int:
    """Blocks of a launch: one a tile, or where channels are unusual a thread a pixel."""
    if name.endswith("any"):
        return -(-n * side * side // THREADS)
    return n * (-(-side // TILE)) ** 2


@functools.cache
def _driver() -> ctypes.CDLL:
    driver = ctypes.CDLL("libcuda.so.1")
    unsigned, pointer = ctypes.c_uint, ctypes.c_void_p
    driver.cuLaunchKernel.argtypes = [pointer, *7 * [unsigned], pointer, pointer, pointer]
    return driver


@functools.cache
def _context(index: int) -> ctypes.c_void_p:
    """The context that torch, too, uses on a device."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _must(_driver().cuDeviceGet(ctypes.byref(device), index), "cuDeviceGet")
    _must(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "its context")
    return context


@functools.cache
def _module(index: int) -> ctypes.c_void_p:
    """The compiled source, loaded on a device."""
    code = cubin(SOURCE, "sm_{}{}".format(*torch.cuda.get_device_capability(index)))
    module = ctypes.c_void_p()
    with torch.cuda.device(index):
        _must(_driver().cuCtxSetCurrent(_context(index)), "its context")
        _must(_driver().cuModuleLoadData(ctypes.byref(module), code), "cuModuleLoadData")
    return module


@functools.cache
def _kernel(name: str, index: int) -> ctypes.c_void_p:
    kernel = ctypes.c_void_p()
    _must(_driver().cuModuleGetFunction(ctypes.byref(kernel), _module(index), name.encode()), name)
    return kernel


def _must(status: int, what: str) -> None:
    if status:
        said = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(said))
        raise RuntimeError(f"CUDA refuses {what}: {(said.value or b'no word').decode()}")
