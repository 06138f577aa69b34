"""Decoders: buffers + windows + size -> uint8 pixels. One file and one line here adds another."""

import importlib
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fastrot.data.decode.raw import WithPixels
from fastrot.errors import UserError

_MODULES = {
    "dali": "fastrot.data.decode.dali",
    "ffcv": "fastrot.data.decode.ffcv",
    "torch": "fastrot.data.decode.torch",
}


class Decoder(Protocol):
    """Stateless but for what is in flight; draws no random number, opens no file."""

    name: str
    """What it is and where it decodes, for a person."""

    def submit(self, buffers: list[NDArray[np.uint8]], windows: NDArray, size: int) -> None:
        """Start on a batch. Windows int32 [n, 4] (top, left, height, width of the upright image) are
        cropped, then resized; float64 boxes [n, 4] are resized with taps outside them (evaluation).
        Buffers are [bytes]; those that are pixels, [H, W, 3], are taken by WithPixels around a decoder."""

    def result(self) -> tuple[torch.Tensor, dict[int, str]]:
        """The oldest batch: uint8 [n, size, size, 3], RGB, where the decoder works; and the
        positions that could not be decoded with the reason (their pixels are undefined)."""

    def one(self, buffer: NDArray[np.uint8], window: NDArray, size: int) -> torch.Tensor:
        """A single image, now, whatever is in flight: window [1, 4] -> uint8 [size, size, 3].
        Raises BadImage."""

    def close(self) -> None: ...


def make_decoder(
    name: str, where: str, device: torch.device, threads: int, batch: int, depth: int
) -> tuple[Decoder, str]:
    """The decoder asked for, and a line that says what was taken and why.

    name   auto, dali, ffcv or torch; where: auto, gpu or cpu.
    batch  most images a submit; depth: most submits in flight.
    Raises UserError where a decoder asked for by name cannot run.
    """
    reason = ""
    if name == "auto":
        name = "dali"
        try:
            importlib.import_module("nvidia.dali")
        except ImportError as error:
            name, reason = "torch", f" (auto: dali cannot be imported: {error})"
    try:
        module = importlib.import_module(_MODULES[name])
    except ImportError as error:
        raise UserError(f"data.decode {name}: cannot be imported ({error}); use data.decode=torch") from None
    decoder = WithPixels(module.make(where, device, threads, batch, depth), threads)
    return decoder, f"decoding with {decoder.name}, {threads} threads{reason}"
