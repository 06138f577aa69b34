"""FFCV's compiled decode and resize on the CPU, on any buffer.

Its shared library is called by ctypes: without the GIL, and without importing the package, whose numba
takes ten seconds. A fast DCT decodes the whole image, an area average resizes the window (bilinear where
it grows). The pixels' stated error against torchvision, windows of photographs at side 224: mean 1.8
levels (0.8 of it a darker image), 99.9% within 24, worst image 6.6 on average.
"""

import ctypes
import importlib.machinery
import importlib.util
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from fastrot.data.decode.batch import Batch
from fastrot.data.decode.orientation import stored_window, upright
from fastrot.data.decode.torch import LeftToPillow, window_pixels
from fastrot.data.images import kind_of
from fastrot.data.jpeg import Frame, frame_of
from fastrot.errors import BadImage


def _library() -> ctypes.CDLL:
    package = importlib.util.find_spec("ffcv")
    if package is None:
        raise ModuleNotFoundError("FFCV is not installed", name="ffcv")
    found = importlib.machinery.PathFinder.find_spec("_libffcv", package.submodule_search_locations)
    if found is None:
        raise ImportError("FFCV is installed without its compiled library")
    try:
        library = ctypes.CDLL(found.origin)
    except OSError as error:
        raise ImportError(f"FFCV's library cannot be loaded: {error}") from None
    u32, u64, i64, pointer = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int64, ctypes.c_void_p
    library.imdecode.argtypes = [pointer, u64, u32, u32, pointer, *(u32,) * 6, ctypes.c_bool, ctypes.c_bool]
    library.resize.argtypes = [i64] * 11
    library.resize.restype = None
    return library


_LIBRARY = _library()
_SCRATCH = 3 << 23  # bytes a thread keeps, 8 megapixels; a larger image's pixels go with it
_scratch = threading.local()


def make(device: torch.device, threads: int, batch: int, depth: int) -> "FfcvDecoder":
    return FfcvDecoder(threads)


class FfcvDecoder:
    """A pool of threads; each takes a batch's next image until there is none."""

    def __init__(self, threads: int):
        self.name = "ffcv on the CPU"
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._flying: deque[tuple[torch.Tensor, dict[int, str], list[Future[None]]]] = deque()
        self._left = LeftToPillow("ffcv")

    def submit(self, batch: Batch) -> None:
        out = torch.empty(len(batch), batch.size, batch.size, 3, dtype=torch.uint8)
        places = iter(range(len(batch)))  # shared: the interpreter's lock makes each `next` whole
        bad: dict[int, str] = {}

        def work() -> None:
            for at in places:
                try:
                    self._into(batch, at, out[at])
                except BadImage as error:
                    bad[at] = str(error)

        self._flying.append((out, bad, [self._pool.submit(work) for _ in range(self._threads)]))

    def result(self) -> tuple[torch.Tensor, dict[int, str]]:
        out, bad, tasks = self._flying.popleft()
        for task in tasks:
            task.result()
        return out, bad

    def one(self, batch: Batch) -> torch.Tensor:
        out = torch.zeros(batch.size, batch.size, 3, dtype=torch.uint8)
        self._into(batch, 0, out)
        return out

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _into(self, batch: Batch, at: int, out: torch.Tensor) -> None:
        """One crop into out, uint8 [size, size, 3]. Raises BadImage."""
        kind = kind_of(batch.buffers[at])
        frame = frame_of(batch.buffers[at]) if kind == "JPEG" else None
        if frame is None or not frame.usual:
            self._left.say("JPEG of an unusual coding" if kind == "JPEG" else kind)
        elif not batch.boxes and _decoded(batch, at, frame, out):
            return
        out.copy_(window_pixels(*batch.image(at)))  # which has the last word on what is sound


def _scratch_of(size: int) -> NDArray[np.uint8]:
    """Memory for a decoded image: the thread's own, or new where it would keep too much."""
    if size > _SCRATCH:
        return np.empty(size, np.uint8)
    kept: NDArray[np.uint8] | None = getattr(_scratch, "pixels", None)
    if kept is None or len(kept) < size:
        kept = _scratch.pixels = np.empty(size, np.uint8)
    return kept


def _decoded(batch: Batch, at: int, frame: Frame, out: torch.Tensor) -> bool:
    """Whether FFCV decoded the JPEG without a complaint of libjpeg. Raises BadImage where the window leaves it.

    The sizes are those of its header: the library writes nothing past them.
    """
    buffer, orientation, window, size = batch.image(at)
    height, width = frame.height, frame.width
    top, left, h, w = stored_window(window, orientation, height, width).tolist()
    if top < 0 or left < 0 or top + h > height or left + w > width:
        raise BadImage(f"is {width}x{height} as stored, not as indexed")
    pixels = _scratch_of(height * width * 3)
    start = pixels.ctypes.data
    to = (start, height, width, 0, 0, 1, 1, False, False)
    if _LIBRARY.imdecode(buffer.ctypes.data, len(buffer), height, width, *to):
        return False
    _LIBRARY.resize(0, start, height, width, top, top + h, left, left + w, out.data_ptr(), size, size)
    if orientation != 1:
        out.copy_(upright(out.clone(), orientation, 0, 1))
    return True
