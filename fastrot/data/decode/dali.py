"""DALI: windows decoded and resized on the GPU (`mixed`); or decoded on the CPU, where turbo resamples them.

On a CPU DALI's resize takes two fifths of its time, turbo's pass a fraction of that; where turbo cannot be
compiled DALI resizes. The pixels' stated error against Pillow: mean 0.2 levels for windows where DALI
resizes (antialiased, as torchvision); none against torchvision where turbo does.
"""

import io
import logging
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.tensors import TensorCPU, TensorListCPU
from PIL import Image
from torch.utils.dlpack import from_dlpack

from fastrot.data import coding
from fastrot.data.decode import nvjpeg
from fastrot.data.decode.batch import Batch
from fastrot.data.decode.orientation import stored_window, upright
from fastrot.data.decode.torch import LeftToPillow, window_pixels
from fastrot.data.images import kind_of
from fastrot.data.jpeg import frame_of
from fastrot.errors import BadImage, Fault, UserError
from fastrot_kernels.build import BuildError
from fastrot_kernels.turbo import Turbo

log = logging.getLogger(__name__)

_encoded = io.BytesIO()
Image.new("RGB", (8, 8)).save(_encoded, "JPEG")
_SPECK = np.frombuffer(_encoded.getvalue(), np.uint8)

_DECODES = ("JPEG", "PNG", "BMP", "WEBP")
_DEVICES_OWN = (torch.OutOfMemoryError, torch.AcceleratorError)  # RuntimeErrors, as DALI's, but no image's fault


def make(
    device: torch.device, threads: int, batch: int, depth: int, hardware: nvjpeg.Hardware = nvjpeg.UNKNOWN
) -> "DaliDecoder":
    """Raises UserError where its pipeline cannot be built: DALI builds lazily, so one is built here."""
    if device.type == "cuda":
        decoder = DaliDecoder(device.index, threads, batch, depth, hardware)
    else:
        decoder = DaliDecoder(None, threads, batch, depth, resampler=_resampler(threads))
    try:
        decoder.build(boxes=False)
    except Fault as error:
        decoder.close()
        raise UserError(f"data.decode dali: {error}") from None
    return decoder


def _resampler(threads: int) -> Turbo | None:
    """None where turbo cannot be compiled."""
    try:
        return Turbo(threads)
    except BuildError as error:
        log.warning("dali: turbo cannot be built (%s): DALI resizes", error)
        return None


@dataclass
class Work:
    """A batch; the positions that DALI decodes (Pillow the others); their windows in the stored images."""

    batch: Batch
    by_dali: list[int]
    stored: NDArray[np.int32] | NDArray[np.float64]


def _on_gpu(place: str, hardware: nvjpeg.Hardware, whole: bool) -> dict[str, Any]:
    """Options of `mixed` alone: libjpeg-turbo's chroma filter, elsewhere the only one; the hardware decoder's."""
    if place != "mixed":
        return {}
    filtered = nvjpeg.filters_windows()  # loads nvJPEG, so before DALI does
    return {"jpeg_fancy_upsampling": filtered or whole} | hardware.options()


def _source(name: str, kind: types.DALIDataType = types.FLOAT) -> DataNode:
    return fn.external_source(name=name, dtype=kind, ndim=1, no_copy=name == "data")


@pipeline_def  # type: ignore[untyped-decorator]  # DALI's
def _windows(place: str, device: str, hardware: nvjpeg.Hardware, resized: bool) -> DataNode:
    """Window first, then resize: taps stay inside the window."""
    pixels = fn.decoders.image_slice(
        _source("data", types.UINT8),
        _source("start", types.INT32),
        _source("shape", types.INT32),
        axis_names="HW",
        device=place,
        output_type=types.RGB,
        adjust_orientation=False,
        **_on_gpu(place, hardware, whole=False),
    )
    if not resized:
        return pixels
    return fn.resize(pixels, size=_source("size"), interp_type=types.INTERP_LINEAR, antialias=True, device=device)


@pipeline_def  # type: ignore[untyped-decorator]  # DALI's
def _boxes(place: str, device: str, hardware: nvjpeg.Hardware, resized: bool) -> DataNode:
    """Whole image, then resize of a float box: taps reach outside it, as Pillow's do."""
    pixels = fn.decoders.image(
        _source("data", types.UINT8),
        device=place,
        output_type=types.RGB,
        adjust_orientation=False,
        **_on_gpu(place, hardware, whole=True),
    )
    if not resized:
        return pixels
    size, start, end = (_source(name) for name in ("size", "start", "end"))
    return fn.resize(
        pixels, size=size, roi_start=start, roi_end=end, interp_type=types.INTERP_LINEAR, antialias=True, device=device
    )


def _arguments(windows: NDArray[Any], size: int, resized: bool) -> dict[str, NDArray[Any]]:
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
        hardware: nvjpeg.Hardware = nvjpeg.UNKNOWN,
        resampler: Turbo | None = None,
    ):
        self.name = "dali on the CPU" if gpu is None else f"dali on GPU {gpu} (mixed)"
        self.name += ", resampled by turbo" if resampler else ""
        self._gpu, self._threads, self._batch, self._depth = gpu, threads, batch, depth
        self._hardware, self._resampler = hardware, resampler
        self._pipes: dict[bool, Pipeline] = {}
        self._alone: DaliDecoder | None = None
        self._flying: deque[Work] = deque()
        self._broken = False
        self._left = LeftToPillow("dali")
        self._stream = None if gpu is None else torch.cuda.Stream(gpu)

    def submit(self, batch: Batch) -> None:
        work = work_of(batch)
        self._flying.append(work)
        try:
            self._feed(work)
        except _DEVICES_OWN:
            raise
        except RuntimeError:
            self._pipes.clear()
            self._broken = True  # an earlier batch did it; its `result` submits this one again

    def result(self) -> tuple[torch.Tensor, dict[int, str]]:
        work = self._flying[0]
        bad: dict[int, str] = {}
        try:
            if self._broken:
                raise RuntimeError("broken by a batch in flight")
            pixels = self._collect(work)
        except _DEVICES_OWN:
            raise
        except RuntimeError:  # DALI names one culprit at most and its pipeline is lost: look at each
            self._pipes.clear()
            self._broken = False
            pixels, bad = self._one_by_one(work)
            for later in list(self._flying)[1:]:
                self._feed(later)
        self._flying.popleft()
        self._by_pillow(work, pixels, bad)
        return pixels, bad

    def _by_pillow(self, work: Work, pixels: torch.Tensor, bad: dict[int, str]) -> None:
        """What DALI is not given, into its places; or why it is bad."""
        for at in sorted(set(range(len(work.batch))) - set(work.by_dali)):
            kind = kind_of(work.batch.buffers[at])
            self._left.say(f"{kind} of an unusual coding" if kind in _DECODES else kind)
            try:
                pixels[at] = window_pixels(*work.batch.image(at))
            except BadImage as error:
                bad[at] = str(error)

    def close(self) -> None:
        self._pipes.clear()
        if self._resampler:
            self._resampler.close()

    def _pipe(self, boxes: bool) -> Pipeline:
        if boxes not in self._pipes:
            self.build(boxes)
        return self._pipes[boxes]

    def build(self, boxes: bool) -> None:
        """The pipeline of windows or of boxes. Raises Fault where that fails: no image's doing, so none is tried alone."""
        try:
            pipe = (_boxes if boxes else _windows)(
                "cpu" if self._gpu is None else "mixed",
                "cpu" if self._gpu is None else "gpu",
                self._hardware,
                self._resampler is None,
                batch_size=self._batch,
                num_threads=self._threads,
                device_id=self._gpu,
                prefetch_queue_depth=self._depth + 1,
                exec_dynamic=True,
            )
            self._warm_up(pipe, boxes)
        except (RuntimeError, MemoryError) as error:
            raise Fault(f"{self.name}: its pipeline cannot be built ({shorten(str(error), 300)})") from error
        self._pipes[boxes] = pipe

    def _warm_up(self, pipe: Pipeline, boxes: bool) -> None:
        """DALI's first schedule_run runs as many batches as its queue is deep, and wants them fed
        first; so it gets dummies, and from then on one schedule_run is one batch."""
        window: NDArray[Any] = np.array([[0, 0, 8, 8]], np.float64 if boxes else np.int32)
        speck = Work(Batch([_SPECK], np.ones(1, np.uint8), window, 8), [0], window)
        for _ in range(self._depth + 1):
            self._put(pipe, speck)
        pipe.schedule_run()
        for _ in range(self._depth + 1):
            pipe.share_outputs()
            pipe.release_outputs()

    def _feed(self, work: Work) -> None:
        if work.by_dali:
            pipe = self._pipe(work.batch.boxes)
            self._put(pipe, work)
            pipe.schedule_run()

    def _put(self, pipe: Pipeline, work: Work) -> None:
        files = [TensorCPU(work.batch.buffers[at]) for at in work.by_dali]
        pipe.feed_input("data", TensorListCPU(files, contiguous=False))  # type: ignore[call-overload]  # its stubs lack it
        for name, array in _arguments(work.stored, work.batch.size, self._resampler is None).items():
            pipe.feed_input(name, np.ascontiguousarray(array))

    def _collect(self, work: Work) -> torch.Tensor:
        if not work.by_dali:
            return self._empty(work)
        pipe = self._pipe(work.batch.boxes)
        (out,) = pipe.share_outputs()
        good = self._resampled(out, work) if self._resampler else self._kept(out.as_tensor())
        pipe.release_outputs()
        if not self._resampler:
            orientations = work.batch.orientations[work.by_dali]
            for at in np.flatnonzero(orientations != 1).tolist():
                good[at] = upright(good[at].clone(), int(orientations[at]), 0, 1)
        if len(good) == len(work.batch):
            return good
        pixels = self._empty(work)
        pixels[work.by_dali] = good
        return pixels

    def _resampled(self, out: Iterable[Any], work: Work) -> torch.Tensor:
        """The stored windows that DALI decoded, or boxes of whole images, turned upright. Raises RuntimeError as DALI."""
        batch, resampler = work.batch, self._resampler
        assert resampler is not None
        windows = batch.windows[work.by_dali]
        if not batch.boxes:
            windows[:, :2] = 0
        resampler.submit([np.asarray(pixels) for pixels in out], batch.orientations[work.by_dali], windows, batch.size)
        resampled, failed = resampler.result()
        if failed:
            raise RuntimeError(f"images {list(failed)} cannot be resampled")
        return torch.from_numpy(resampled)

    def _kept(self, shared: Any) -> torch.Tensor:
        """Pixels that DALI does not write over. On a CPU its dynamic executor takes new memory for each
        batch, and frees it with the tensor; on a GPU a copy, done before the buffer goes back, on a
        stream of its own, since torch's default one is busy with training."""
        if self._stream is None:
            return from_dlpack(shared)
        with torch.cuda.stream(self._stream):
            copy = from_dlpack(shared).clone()
        self._stream.record_event().synchronize()  # of this copy alone: torch's sync debug mode lets it pass
        copy.record_stream(torch.cuda.default_stream(self._gpu))
        return copy

    def _one_by_one(self, work: Work) -> tuple[torch.Tensor, dict[int, str]]:
        """A batch that broke the pipeline, an image at a time."""
        pixels, bad = self._empty(work), {}
        for at in work.by_dali:
            try:
                pixels[at] = self.one(work.batch.some([at]))
            except BadImage as error:
                bad[at] = str(error)
        return pixels, bad

    def one(self, batch: Batch) -> torch.Tensor:
        """By a pipeline of its own; what DALI refuses goes to Pillow, which has the last word."""
        if self._alone is None:
            self._alone = DaliDecoder(self._gpu, self._threads, 1, 1, self._hardware, self._resampler)
        work = work_of(batch)
        try:
            if work.by_dali:
                self._alone._feed(work)
                return self._alone._collect(work)[0]
        except _DEVICES_OWN:
            raise
        except RuntimeError:
            self._alone._pipes.clear()
        return window_pixels(*batch.image(0))

    def _empty(self, work: Work) -> torch.Tensor:
        device = "cpu" if self._gpu is None else f"cuda:{self._gpu}"
        shape = len(work.batch), work.batch.size, work.batch.size, 3
        return torch.zeros(shape, dtype=torch.uint8, device=device)


def work_of(batch: Batch) -> Work:
    """DALI's share: JPEGs of the usual codings, turned or not, and plain upright files of other kinds."""
    codings, turned, stored = batch.known_codings(), batch.orientations != 1, batch.windows.copy()
    taken = (codings == coding.JPEG) | ((codings == coding.PLAIN) & ~turned)
    for at in np.flatnonzero(taken & turned).tolist():
        if frame := frame_of(batch.buffers[at]):
            stored[at] = stored_window(batch.windows[at], int(batch.orientations[at]), frame.height, frame.width)
        taken[at] = frame is not None
    by_dali = np.flatnonzero(taken).tolist()
    return Work(batch, by_dali, stored[by_dali])
