"""Decoders: a batch of buffers, orientations and windows -> uint8 pixels. One file and one line here adds another."""

import importlib
from itertools import chain, repeat
from typing import Protocol

import torch

from fastrot.data.decode.batch import Batch
from fastrot.data.decode.nvjpeg import UNKNOWN, Hardware
from fastrot.data.decode.raw import WithPixels
from fastrot.errors import UserError, why_not_there

DECODERS = {
    "dali": "fastrot.data.decode.dali:make",
    "torch": "fastrot.data.decode.torch:make",
    "turbo": "fastrot.data.decode.turbo:make",
    "turbo_fast": "fastrot.data.decode.turbo:make_fast",
    "ffcv": "fastrot.data.decode.ffcv:make",
    "nvimgcodec": "fastrot.data.decode.nvimgcodec:make",
}

# A decoder's error on photographs, levels of 255 against the torch decoder: mean, and the worst image's mean.
STATED = {
    "turbo": (0.001, 0.05), "turbo_fast": (1.2, 4), "dali": (0.01, 0.5), "ffcv": (1.9, 8), "nvimgcodec": (0.001, 0.05),
}  # fmt: skip

# What auto tries, the fastest first as bench/loader.py measures.
_ON_GPU = "dali"
GPUS_OWN = (_ON_GPU, "nvimgcodec")  # that decode there
_ON_CPU = ["turbo", "dali", "torch"]
# Those that resample buffers of pixels themselves; others have one of them do it.
_TAKE_PIXELS = ["turbo", "turbo_fast", "torch"]
_CPU = torch.device("cpu")


class Decoder(Protocol):
    """Stateless but for what is in flight; draws no random number, opens no file."""

    name: str
    """What it is and where it decodes, for a person."""

    def submit(self, batch: Batch) -> None:
        """Start on a batch; some decoders leave its pixels to the WithPixels around them."""

    def result(self) -> tuple[torch.Tensor, dict[int, str]]:
        """The oldest batch: uint8 [n, size, size, 3], RGB, where the decoder works; and the
        positions that could not be decoded with the reason (their pixels are undefined)."""

    def one(self, batch: Batch) -> torch.Tensor:
        """The batch's single image, now, whatever is in flight: uint8 [size, size, 3]. Raises BadImage."""

    def close(self) -> None: ...


def make_decoder(
    name: str,
    where: str,
    device: torch.device,
    threads: int,
    batch: int,
    depth: int,
    hardware: Hardware = UNKNOWN,
) -> tuple[Decoder, str]:
    """The decoder asked for, and a line that says what was taken and why.

    name   auto, or one of the makers' names; where: auto, cpu, or gpu, which is dali's alone.
    batch  most images a submit; depth: most submits in flight.
    hardware  what a GPU's own decoder is told.
    Raises UserError where a decoder asked for by name cannot run.
    """
    if where == "gpu" and device.type != "cuda":
        raise UserError("data.decode_on gpu: there is no CUDA device here; use data.decode_on=cpu")
    on_gpu = device.type == "cuda" and where != "cpu"
    names = [name] if name != "auto" else [_ON_GPU] if where == "gpu" else [_ON_GPU, *_ON_CPU] if on_gpu else _ON_CPU
    decoder, refusals = _first(names, device if on_gpu else _CPU, threads, batch, depth, hardware)
    why = f" (auto: {'; '.join(refusals)})" if refusals else ""
    return decoder, f"decoding with {decoder.name}, {threads} threads{why}"


def _first(
    names: list[str], device: torch.device, threads: int, batch: int, depth: int, hardware: Hardware = UNKNOWN
) -> tuple[Decoder, list[str]]:
    """The first of these decoders that runs here, the first on `device`, others on the CPU; why those before do not."""
    refusals: list[str] = []
    for name, where in zip(names, chain([device], repeat(_CPU)), strict=False):
        module, _, maker = DECODERS[name].partition(":")
        gpu_only = {"hardware": hardware} if name in GPUS_OWN else {}
        try:
            decoder = getattr(importlib.import_module(module), maker)(where, threads, batch, depth, **gpu_only)
        except ImportError as error:
            refusals.append(f"data.decode {name}: {why_not_there(error)}")
        except UserError as error:
            refusals.append(str(error))
        else:
            if name not in _TAKE_PIXELS:
                decoder = WithPixels(decoder, lambda: _first(_TAKE_PIXELS, _CPU, threads, batch, depth)[0])
            return decoder, refusals
    raise UserError("; ".join(refusals) + "; use data.decode=torch")
