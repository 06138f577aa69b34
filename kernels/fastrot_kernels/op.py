"""The operation torch sees: argument checks, the custom op, its fake, the public function."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrot_kernels import backends
from fastrot_kernels.layout import Crops, channels_first
from fastrot_kernels.operation import operation

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def rotate_views(
    x: Tensor,
    flips: Tensor,
    turns: Tensor,
    mean: Tensor | Sequence[float],
    std: Tensor | Sequence[float],
    dtype: torch.dtype,
    pad_channels: int = 0,
    *,
    backend: str = "auto",
) -> Tensor:
    """Flip, turn and normalise upright crops into the views a step trains on.

    x             uint8 [n, S, S, C], 0..255.    flips  uint8 [n]; not 0 = mirror left-right.
    turns         uint8 [n, V], quarter turns counter-clockwise, after the flip, as torch.rot90;
                  read as `turns & 3`, since looking for others would wait for the device.
    mean, std     [C], on the 0..255 scale: float32 tensors on x's device, or floats, which are
                  copied there at every call (a training loop should hold tensors).
    dtype         float32, float16 or bfloat16; computed in float32, then rounded.
    pad_channels  channels C' of the result, the last C' - C of them zero; 0 means C' = C.
    backend       auto, or a name in `backends.BACKENDS`. On a GPU auto measures at its first call,
                  which no CUDA graph can capture: call once before.
    Returns       dtype [n*V, C', S, S], channels-last; view v of image i is row i*V + v. Backends
                  agree within 1 ulp of dtype.
    Raises        ValueError if a crop is not square (a quarter turn would reshape it) or an
                  argument's shape, dtype or device is wrong; RuntimeError if the named backend
                  cannot run.
    Source        RotNet, arXiv:1803.07728.
    """
    mean, std = _channel_values(mean, x), _channel_values(std, x)
    return rotate_views_op(x, flips, turns, mean, std, dtype, pad_channels, backend)


@operation("fastrot::rotate_views")
def rotate_views_op(
    x: Tensor,
    flips: Tensor,
    turns: Tensor,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype,
    pad_channels: int = 0,
    backend: str = "auto",
) -> Tensor:
    """`rotate_views` on tensors alone, opaque to torch.compile."""
    return backends.run(backend, _checked(Crops(x, flips, turns, mean, std, dtype, pad_channels)))


@rotate_views_op.register_fake
def _(*arguments: Any) -> Tensor:
    return channels_first(_checked(Crops(*arguments[:7])).empty_views())  # the last is the backend


def _channel_values(values: Tensor | Sequence[float], x: Tensor) -> Tensor:
    if isinstance(values, Tensor):
        return values
    return torch.tensor(values, dtype=torch.float32, device=x.device)


def _checked(crops: Crops) -> Crops:
    """The same, with the number of channels written out. Raises ValueError."""
    x, flips, turns, mean, std, dtype, pad_channels = crops
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x has shape {list(x.shape)}; expected [n, S, S, C]")
    n, height, width, channels = x.shape
    if height != width:
        raise ValueError(f"crops are {height} x {width}; a quarter turn needs them square")

    if turns.ndim != 2 or turns.shape[0] != n or turns.shape[1] < 1:
        raise ValueError(f"turns has shape {list(turns.shape)}; expected [{n}, V] with V >= 1")
    for name, tensor, size in (
        ("flips", flips, n),
        ("mean", mean, channels),
        ("std", std, channels),
    ):
        if tensor.ndim != 1 or tensor.shape[0] != size:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; expected [{size}]")

    integers = {"x": x, "flips": flips, "turns": turns}
    floats = {"mean": mean, "std": std}
    for expected, tensors in ((torch.uint8, integers), (torch.float32, floats)):
        for name, tensor in tensors.items():
            if tensor.dtype != expected:
                raise ValueError(f"{name} is {tensor.dtype}; expected {expected}")
            if tensor.device != x.device:
                raise ValueError(f"{name} is on {tensor.device} and x on {x.device}; move one")

    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}; expected one of {', '.join(map(str, DTYPES))}")
    if pad_channels != 0 and pad_channels < channels:
        raise ValueError(f"pad_channels is {pad_channels}; expected 0 or at least {channels}, the channels of x")
    return crops._replace(channels=pad_channels or channels)
