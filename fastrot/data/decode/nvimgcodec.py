"""nvImageCodec, the library under DALI's decoders, by itself: a damaged image breaks no pipeline and holds up no other.

It decodes windows alone; torch resizes them, antialiased, one by one. Boxes go through Pillow. The pixels' stated error
is torchvision's own on a CPU; on a GPU its filters and roundings may differ by a level.
"""

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F
from torch.utils.dlpack import from_dlpack

from fastrot.data.decode.batch import Batch
from fastrot.data.decode.dali import work_of
from fastrot.data.decode.nvjpeg import UNKNOWN, Hardware
from fastrot.data.decode.orientation import upright
from fastrot.data.decode.torch import LeftToPillow, window_pixels
from fastrot.data.images import kind_of
from fastrot.errors import BadImage

os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")  # what is bad we say ourselves; read as it is imported
from nvidia import nvimgcodec

_Decoded = tuple[torch.Tensor, dict[int, str]]


def make(
    device: torch.device, threads: int, batch: int, depth: int, hardware: Hardware = UNKNOWN
) -> "NvImageCodecDecoder":
    return NvImageCodecDecoder(device, threads, hardware)


class NvImageCodecDecoder:
    """One thread works off the batches; the library has its own, and streams."""

    def __init__(self, device: torch.device, threads: int, hardware: Hardware):
        on_gpu, kinds = device.type == "cuda", nvimgcodec
        self.name = f"nvimgcodec on GPU {device.index}" if on_gpu else "nvimgcodec on the CPU"
        self._device, self._stream = device, torch.cuda.Stream(device) if on_gpu else None
        backends = [kinds.Backend(kinds.CPU_ONLY)]
        if on_gpu:
            load = hardware.options()["hw_decoder_load"]
            ours = [kinds.Backend(kinds.HW_GPU_ONLY, load_hint=load)] if load else []
            backends = [*ours, *map(kinds.Backend, (kinds.GPU_ONLY, kinds.HYBRID_CPU_GPU)), *backends]
        where = device.index if on_gpu else kinds.NVIMGCODEC_DEVICE_CPU_ONLY
        self._decoder = kinds.Decoder(where, threads, backends)
        self._how = kinds.DecodeParams(color_spec=kinds.ColorSpec.SRGB, apply_exif_orientation=False)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="decode")
        self._flying: deque[Future[_Decoded]] = deque()
        self._left = LeftToPillow("nvimgcodec")

    def submit(self, batch: Batch) -> None:
        self._flying.append(self._pool.submit(self._decode, batch))

    def result(self) -> _Decoded:
        return self._flying.popleft().result()

    def one(self, batch: Batch) -> torch.Tensor:
        pixels, bad = self._pool.submit(self._decode, batch).result()
        if bad:
            raise BadImage(bad[0])
        return pixels[0]

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _decode(self, batch: Batch) -> _Decoded:
        out = torch.zeros(len(batch), batch.size, batch.size, 3, dtype=torch.uint8, device=self._device)
        bad: dict[int, str] = {}
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            if self._stream:
                self._stream.wait_stream(torch.cuda.default_stream(self._device))  # which filled `out`
            done = {} if batch.boxes else self._windows(batch)
            for at, pixels in done.items():
                out[at] = upright(_resized(pixels, batch.size), int(batch.orientations[at]), 0, 1)
        for at in sorted(set(range(len(batch))) - done.keys()):  # Pillow has the last word
            try:
                out[at] = window_pixels(*batch.image(at))
            except BadImage as error:
                bad[at] = str(error)
        if self._stream:
            self._stream.record_event().synchronize()
        return out, bad

    def _windows(self, batch: Batch) -> dict[int, torch.Tensor]:
        """The stored windows that the library decodes, uint8 [height, width, 3], by position."""
        work, streams = work_of(batch), {}
        for at in set(range(len(batch))) - set(work.by_dali):
            self._left.say(kind_of(batch.buffers[at]))
        for at, window in zip(work.by_dali, work.stored, strict=True):
            if stream := _window_of(batch.buffers[at], window):
                streams[at] = stream
        cuda_stream = self._stream.cuda_stream if self._stream else 0
        images = self._decoder.decode(list(streams.values()), params=self._how, cuda_stream=cuda_stream)
        return {at: self._pixels(image) for at, image in zip(streams, images, strict=True) if image is not None}

    def _pixels(self, image: Any) -> torch.Tensor:
        """Where it was decoded; host memory is no dlpack of the library's without a driver."""
        pixels: torch.Tensor = from_dlpack(image) if self._stream else torch.from_numpy(np.asarray(image))
        return pixels


def _window_of(buffer: NDArray[np.uint8], window: NDArray[np.int32]) -> Any:
    """None where the library cannot parse it, or it is smaller than was indexed."""
    try:
        whole = nvimgcodec.CodeStream(buffer)
    except RuntimeError:
        return None
    top, left, height, width = window.tolist()
    if top + height > whole.height or left + width > whole.width:
        return None
    return whole.get_sub_code_stream(region=nvimgcodec.Region(top, left, top + height, left + width))


def _resized(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 [size, size, 3]. A GPU's antialiased resize takes floats alone."""
    planes = pixels.permute(2, 0, 1)[None]
    planes = planes.float() if planes.is_cuda else planes
    resized = F.interpolate(planes, (size, size), mode="bilinear", antialias=True)
    resized = resized.round().clamp(0, 255).byte() if planes.is_cuda else resized
    return resized[0].permute(1, 2, 0)
