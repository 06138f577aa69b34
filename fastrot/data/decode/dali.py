"""DALI: windows decoded and resized on the device (`mixed`) or on the CPU.

The pixels' stated error against Pillow: mean 0.2 levels for windows (antialiased, as torchvision).
"""

import io
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

from fastrot.data.decode.torch import LeftToPillow, window_pixels
from fastrot.data.faults import kind_of
from fastrot.data.jpeg import frame_of
from fastrot.errors import BadImage

_encoded = io.BytesIO()
Image.new("RGB", (8, 8)).save(_encoded, "JPEG")
_SPECK = np.frombuffer(_encoded.getvalue(), np.uint8)

_DECODES = ("JPEG", "PNG", "BMP", "WEBP")


def make(
    device: torch.device, threads: int, batch: int, depth: int, hw_decoder_load: float | None = None
) -> "DaliDecoder":
    return DaliDecoder(device.index if device.type == "cuda" else None, threads, batch, depth, hw_decoder_load)


@dataclass
class _Batch:
    buffers: list[NDArray[np.uint8]]
    windows: NDArray
    size: int
    by_dali: list[int]  # positions; Pillow decodes the others


def _on_gpu(place: str, hw_decoder_load: float | None) -> dict[str, bool | float]:
    """Options of `mixed` alone: libjpeg-turbo's chroma filter, elsewhere the only one; the hardware decoder's share."""
    if place != "mixed":
        return {}
    return {"jpeg_fancy_upsampling": True} | ({} if hw_decoder_load is None else {"hw_decoder_load": hw_decoder_load})


@pipeline_def
def _windows(place: str, device: str, hw_decoder_load: float | None):
    """Window first, then resize: taps stay inside the window."""
    names = ("data", "start", "shape", "size")
    kinds = (types.UINT8, types.INT32, types.INT32, types.FLOAT)
    data, start, shape, size = (
        fn.external_source(name=name, dtype=kind, ndim=1, no_copy=name == "data") for name, kind in zip(names, kinds, strict=True)
    )
    pixels = fn.decoders.image_slice(
        data,
        start,
        shape,
        axis_names="HW",
        device=place,
        output_type=types.RGB,
        **_on_gpu(place, hw_decoder_load),
    )
    return fn.resize(pixels, size=size, interp_type=types.INTERP_LINEAR, antialias=True, device=device)


@pipeline_def
def _boxes(place: str, device: str, hw_decoder_load: float | None):
    """Whole image, then resize of a float box: taps reach outside it, as Pillow's do."""
    names = ("data", "start", "end", "size")
    kinds = (types.UINT8, types.FLOAT, types.FLOAT, types.FLOAT)
    data, start, end, size = (
        fn.external_source(name=name, dtype=kind, ndim=1, no_copy=name == "data") for name, kind in zip(names, kinds, strict=True)
    )
    pixels = fn.decoders.image(data, device=place, output_type=types.RGB, **_on_gpu(place, hw_decoder_load))
    return fn.resize(
        pixels, size=size, roi_start=start, roi_end=end, interp_type=types.INTERP_LINEAR, antialias=True, device=device
    )


class DaliDecoder:
    """Two pipelines (windows, boxes), built when first needed; rebuilt when a sample breaks one."""

    def __init__(
        self, gpu: int | None, threads: int, batch: int, depth: int, hw_decoder_load: float | None = None
    ):
        self.name = "dali on the CPU" if gpu is None else f"dali on GPU {gpu} (mixed)"
        self._gpu, self._threads, self._batch, self._depth = gpu, threads, batch, depth
        self._hw_decoder_load = hw_decoder_load
        self._pipes: dict = {}
        self._alone: DaliDecoder | None = None
        self._flying: deque[_Batch] = deque()
        self._broken = False
        self._left = LeftToPillow("dali")
        self._stream = None if gpu is None else torch.cuda.Stream(gpu)

    def submit(self, buffers, windows, size) -> None:
        by_dali = [at for at, buffer in enumerate(buffers) if _decodes(buffer)]
        batch = _Batch(buffers, windows, size, by_dali)
        self._flying.append(batch)
        try:
            self._feed(batch)
        except RuntimeError:
            self._pipes.clear()
            self._broken = True  # an earlier batch did it; its `result` submits this one again

    def result(self):
        batch = self._flying[0]
        try:
            if self._broken:
                raise RuntimeError("broken by a batch in flight")
            pixels, bad = self._collect(batch), {}
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # DALI names one culprit at most and its pipeline is lost: look at each
            self._pipes.clear()
            self._broken = False
            pixels, bad = self._one_by_one(batch)
            for later in list(self._flying)[1:]:
                self._feed(later)
        self._flying.popleft()
        for at in sorted(set(range(len(batch.buffers))) - set(batch.by_dali)):
            kind = kind_of(batch.buffers[at])
            kind = "JPEG of four colours" if kind == "JPEG" else kind
            self._left.say(kind)
            try:
                pixels[at] = window_pixels(batch.buffers[at], batch.windows[at], batch.size)
            except BadImage as error:
                bad[at] = str(error)
        return pixels, bad

    def close(self) -> None:
        self._pipes.clear()

    def _pipe(self, kind):
        if kind not in self._pipes:
            make_pipe = _boxes if kind == np.float64 else _windows
            pipe = make_pipe(
                "cpu" if self._gpu is None else "mixed",
                "cpu" if self._gpu is None else "gpu",
                self._hw_decoder_load,
                batch_size=self._batch,
                num_threads=self._threads,
                device_id=self._gpu,
                prefetch_queue_depth=self._depth + 1,
                exec_dynamic=True,
            )
            self._pipes[kind] = pipe
            self._warm_up(pipe, kind)
        return self._pipes[kind]

    def _warm_up(self, pipe, kind) -> None:
        """DALI's first schedule_run runs as many batches as its queue is deep, and wants them fed
        first; so it gets dummies, and from then on one schedule_run is one batch."""
        speck = _Batch([_SPECK], np.array([[0, 0, 8, 8]], kind), 8, [0])
        for _ in range(self._depth + 1):
            self._put(pipe, speck)
        pipe.schedule_run()
        for _ in range(self._depth + 1):
            pipe.share_outputs()
            pipe.release_outputs()

    def _feed(self, batch: _Batch) -> None:
        if batch.by_dali:
            pipe = self._pipe(batch.windows.dtype)
            self._put(pipe, batch)
            pipe.schedule_run()

    @staticmethod
    def _put(pipe, batch: _Batch) -> None:
        chosen = batch.windows[batch.by_dali]
        first, second = chosen[:, :2], chosen[:, 2:]
        names = ("data", "start", "shape")
        if chosen.dtype == np.float64:
            names = ("data", "start", "end")
            first, second = first.astype(np.float32), (first + second).astype(np.float32)
        sizes = np.full((len(chosen), 2), batch.size, np.float32)
        pipe.feed_input(names[0], [batch.buffers[at] for at in batch.by_dali])
        for name, array in zip((*names[1:], "size"), (first, second, sizes), strict=True):
            pipe.feed_input(name, np.ascontiguousarray(array))

    def _collect(self, batch: _Batch) -> torch.Tensor:
        if not batch.by_dali:
            return self._empty(batch)
        pipe = self._pipe(batch.windows.dtype)
        (out,) = pipe.share_outputs()
        good = self._kept(out.as_tensor())
        pipe.release_outputs()
        if len(good) == len(batch.buffers):
            return good
        pixels = self._empty(batch)
        pixels[batch.by_dali] = good
        return pixels

    def _kept(self, shared) -> torch.Tensor:
        """Pixels that DALI does not write over. On a CPU its dynamic executor takes new memory for each
        batch, and frees it with the tensor; on a GPU a copy, done before the buffer goes back, on a
        stream of its own, since torch's default one is busy with training."""
        if self._gpu is None:
            return torch.from_dlpack(shared)
        with torch.cuda.stream(self._stream):
            copy = torch.from_dlpack(shared).clone()
        self._stream.synchronize()
        copy.record_stream(torch.cuda.default_stream(self._gpu))
        return copy

    def _one_by_one(self, batch: _Batch) -> tuple[torch.Tensor, dict[int, str]]:
        """A batch that broke the pipeline, an image at a time."""
        pixels, bad = self._empty(batch), {}
        for at in batch.by_dali:
            try:
                pixels[at] = self.one(batch.buffers[at], batch.windows[at : at + 1], batch.size)
            except BadImage as error:
                bad[at] = str(error)
        return pixels, bad

    def one(self, buffer, window, size):
        """By a pipeline of its own; what DALI refuses goes to Pillow, which has the last word."""
        if self._alone is None:
            self._alone = DaliDecoder(self._gpu, self._threads, 1, 1, self._hw_decoder_load)
        by_dali = [0] if _decodes(buffer) else []
        batch = _Batch([buffer], window, size, by_dali)
        try:
            if by_dali:
                self._alone._feed(batch)
                return self._alone._collect(batch)[0]
        except RuntimeError:
            self._alone._pipes.clear()
        return window_pixels(buffer, window[0], size)

    def _empty(self, batch: _Batch) -> torch.Tensor:
        device = "cpu" if self._gpu is None else f"cuda:{self._gpu}"
        return torch.zeros(len(batch.buffers), batch.size, batch.size, 3, dtype=torch.uint8, device=device)


def _decodes(buffer: NDArray[np.uint8]) -> bool:
    kind = kind_of(buffer)
    if kind == "JPEG" and (frame := frame_of(buffer)):
        return frame.components != 4  # DALI inverts them by Adobe's marker, Pillow always
    return kind in _DECODES
