"""DALI: windows decoded and resized on the GPU (`mixed`); or decoded on the CPU, where turbo resamples them.

On a CPU DALI's resize takes two fifths of its time, turbo's pass a fraction of that; where turbo cannot be
compiled DALI resizes. The pixels' stated error against Pillow: mean 0.2 levels for windows where DALI
resizes (antialiased, as torchvision); none against torchvision where turbo does.
"""

import io
import logging
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

from fastrot.data.decode.torch import LeftToPillow, window_pixels
from fastrot.data.images import kind_of
from fastrot.data.jpeg import frame_of
from fastrot.errors import BadImage
from fastrot_kernels.build import BuildError
from fastrot_kernels.turbo import Turbo

log = logging.getLogger(__name__)

_encoded = io.BytesIO()
Image.new("RGB", (8, 8)).save(_encoded, "JPEG")
_SPECK = np.frombuffer(_encoded.getvalue(), np.uint8)

_DECODES = ("JPEG", "PNG", "BMP", "WEBP")
_DEVICES_OWN = (torch.OutOfMemoryError, torch.AcceleratorError)  # RuntimeErrors, as DALI's, but no image's fault


def make(
    device: torch.device, threads: int, batch: int, depth: int, hw_decoder_load: float | None = None
) -> "DaliDecoder":
    if device.type == "cuda":
        return DaliDecoder(device.index, threads, batch, depth, hw_decoder_load)
    return DaliDecoder(None, threads, batch, depth, resampler=_resampler(threads))


def _resampler(threads: int) -> Turbo | None:
    """None where turbo cannot be compiled."""
    try:
        return Turbo(threads)
    except BuildError as error:
        log.warning("dali: turbo cannot be built (%s): DALI resizes", error)
        return None


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


def _source(name: str, kind=types.FLOAT):
    return fn.external_source(name=name, dtype=kind, ndim=1, no_copy=name == "data")


@pipeline_def
def _windows(place: str, device: str, hw_decoder_load: float | None, resized: bool):
    """Window first, then resize: taps stay inside the window."""
    pixels = fn.decoders.image_slice(
        _source("data", types.UINT8),
        _source("start", types.INT32),
        _source("shape", types.INT32),
        axis_names="HW",
        device=place,
        output_type=types.RGB,
        **_on_gpu(place, hw_decoder_load),
    )
    if not resized:
        return pixels
    return fn.resize(pixels, size=_source("size"), interp_type=types.INTERP_LINEAR, antialias=True, device=device)


@pipeline_def
def _boxes(place: str, device: str, hw_decoder_load: float | None, resized: bool):
    """Whole image, then resize of a float box: taps reach outside it, as Pillow's do."""
    pixels = fn.decoders.image(
        _source("data", types.UINT8), device=place, output_type=types.RGB, **_on_gpu(place, hw_decoder_load)
    )
    if not resized:
        return pixels
    size, start, end = (_source(name) for name in ("size", "start", "end"))
    return fn.resize(
        pixels, size=size, roi_start=start, roi_end=end, interp_type=types.INTERP_LINEAR, antialias=True, device=device
    )


def _arguments(windows: NDArray, size: int, resized: bool) -> dict[str, NDArray]:
    """What these pipelines take beside the data."""
    first, second = windows[:, :2], windows[:, 2:]
    sizes = {"size": np.full((len(windows), 2), size, np.float32)} if resized else {}
    if windows.dtype != np.float64:
        return {"start": first, "shape": second} | sizes
    if not resized:
        return {}
    return {"start": first.astype(np.float32), "end": (first + second).astype(np.float32)} | sizes


class DaliDecoder:
    """Two pipelines (windows, boxes), built when first needed; rebuilt when a sample breaks one.

    resampler  takes the decoded windows, on a CPU; None: DALI resizes them.
    """

    def __init__(
        self,
        gpu: int | None,
        threads: int,
        batch: int,
        depth: int,
        hw_decoder_load: float | None = None,
        resampler: Turbo | None = None,
    ):
        self.name = "dali on the CPU" if gpu is None else f"dali on GPU {gpu} (mixed)"
        self.name += ", resampled by turbo" if resampler else ""
        self._gpu, self._threads, self._batch, self._depth = gpu, threads, batch, depth
        self._hw_decoder_load, self._resampler = hw_decoder_load, resampler
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
        except _DEVICES_OWN:
            raise
        except RuntimeError:
            self._pipes.clear()
            self._broken = True  # an earlier batch did it; its `result` submits this one again

    def result(self):
        batch = self._flying[0]
        try:
            if self._broken:
                raise RuntimeError("broken by a batch in flight")
            pixels, bad = self._collect(batch), {}
        except _DEVICES_OWN:
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
        if self._resampler:
            self._resampler.close()

    def _pipe(self, kind):
        if kind not in self._pipes:
            make_pipe = _boxes if kind == np.float64 else _windows
            pipe = make_pipe(
                "cpu" if self._gpu is None else "mixed",
                "cpu" if self._gpu is None else "gpu",
                self._hw_decoder_load,
                self._resampler is None,
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

    def _put(self, pipe, batch: _Batch) -> None:
        pipe.feed_input("data", [batch.buffers[at] for at in batch.by_dali])
        arguments = _arguments(batch.windows[batch.by_dali], batch.size, self._resampler is None)
        for name, array in arguments.items():
            pipe.feed_input(name, np.ascontiguousarray(array))

    def _collect(self, batch: _Batch) -> torch.Tensor:
        if not batch.by_dali:
            return self._empty(batch)
        pipe = self._pipe(batch.windows.dtype)
        (out,) = pipe.share_outputs()
        good = self._resampled(out, batch) if self._resampler else self._kept(out.as_tensor())
        pipe.release_outputs()
        if len(good) == len(batch.buffers):
            return good
        pixels = self._empty(batch)
        pixels[batch.by_dali] = good
        return pixels

    def _resampled(self, out, batch: _Batch) -> torch.Tensor:
        """The windows that DALI decoded, or boxes of whole images. Raises RuntimeError as DALI does."""
        windows = batch.windows[batch.by_dali]
        if windows.dtype != np.float64:
            windows[:, :2] = 0
        self._resampler.submit([np.asarray(pixels) for pixels in out], windows, batch.size)
        resampled, failed = self._resampler.result()
        if failed:
            raise RuntimeError(f"images {list(failed)} cannot be resampled")
        return torch.from_numpy(resampled)

    def _kept(self, shared) -> torch.Tensor:
        """Pixels that DALI does not write over. On a CPU its dynamic executor takes new memory for each
        batch, and frees it with the tensor; on a GPU a copy, done before the buffer goes back, on a
        stream of its own, since torch's default one is busy with training."""
        if self._gpu is None:
            return torch.from_dlpack(shared)
        with torch.cuda.stream(self._stream):
            copy = torch.from_dlpack(shared).clone()
        self._stream.record_event().synchronize()  # of this copy alone: torch's sync debug mode lets it pass
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
            self._alone = DaliDecoder(self._gpu, self._threads, 1, 1, self._hw_decoder_load, self._resampler)
        by_dali = [0] if _decodes(buffer) else []
        batch = _Batch([buffer], window, size, by_dali)
        try:
            if by_dali:
                self._alone._feed(batch)
                return self._alone._collect(batch)[0]
        except _DEVICES_OWN:
            raise
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
