"""FFCV's compiled decode and resize on the CPU, on any buffer.

Its shared library is called by ctypes: without the GIL, and without importing the package, whose numba
takes ten seconds. A fast DCT decodes the whole image, an area average resizes the window (bilinear where
it grows). The pixels' stated error against torchvision, windows of photographs at side 224: mean 1.8
levels (0.8 of it a darker image), 99.9% within 24, worst image 6.6 on average.
"""

import ctypes
import importlib.machinery
import importlib.util
import io
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from fastrot.data.decode.torch import LeftToPillow, window_pixels
from fastrot.data.images import kind_of, open_image, orientation_of
from fastrot.data.jpeg import Frame, frame_of
from fastrot.errors import BadImage


def _library() -> ctypes.CDLL:
    package = importlib.util.find_spec("ffcv")
    if package is None:
        raise ImportError("FFCV is not installed; `make setup` says what it needs")
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
_scratch = threading.local()


def make(device: torch.device, threads: int, batch: int, depth: int) -> "FfcvDecoder":
    return FfcvDecoder(threads)


class FfcvDecoder:
    """A pool of threads; each takes a batch's next image until there is none."""

    def __init__(self, threads: int):
        self.name = "ffcv on the CPU"
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._flying: deque[tuple[torch.Tensor, dict[int, str], list[Future]]] = deque()
        self._left = LeftToPillow("ffcv")

    def submit(self, buffers, windows, size) -> None:
        out = torch.empty(len(buffers), size, size, 3, dtype=torch.uint8)
        places, bad = iter(range(len(buffers))), {}  # shared: the interpreter's lock makes each `next` whole

        def work() -> None:
            for at in places:
                try:
                    self._into(buffers[at], windows[at], out[at])
                except BadImage as error:
                    bad[at] = str(error)

        self._flying.append((out, bad, [self._pool.submit(work) for _ in range(self._threads)]))

    def result(self):
        out, bad, tasks = self._flying.popleft()
        for task in tasks:
            task.result()
        return out, bad

    def one(self, buffer, window, size):
        out = torch.zeros(size, size, 3, dtype=torch.uint8)
        self._into(buffer, window[0], out)
        return out

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _into(self, buffer: NDArray[np.uint8], window: NDArray, out: torch.Tensor) -> None:
        """One crop into out, uint8 [size, size, 3]. Raises BadImage."""
        frame, kind = _frame(buffer)
        if kind:
            self._left.say(kind)
        elif window.dtype != np.float64 and _decoded(buffer, frame, window, out):
            return
        out.copy_(window_pixels(buffer, window, len(out)))  # which has the last word on what is sound


def _frame(buffer: NDArray[np.uint8]) -> tuple[Frame | None, str]:
    """A JPEG's frame; and, where it is not one that FFCV decodes as it should be, of what kind it is."""
    if (kind := kind_of(buffer)) != "JPEG":
        return None, kind
    frame = frame_of(buffer)
    if frame is None or not frame.usual:
        return frame, "JPEG of an unusual coding"
    if frame.exif and orientation_of(open_image(io.BytesIO(buffer))) != 1:
        return frame, "JPEG turned by EXIF"
    return frame, ""


def _decoded(buffer: NDArray[np.uint8], frame: Frame, window: NDArray, out: torch.Tensor) -> bool:
    """Whether FFCV decoded the JPEG without a complaint of libjpeg. Raises BadImage where the window leaves it.

    The sizes are those of its header: the library writes nothing past them.
    """
    height, width = frame.height, frame.width
    top, left, h, w = window.tolist()
    if top + h > height or left + w > width:
        raise BadImage(f"is {width}x{height}, not as indexed")
    pixels = getattr(_scratch, "pixels", None)
    if pixels is None or len(pixels) < height * width * 3:
        pixels = _scratch.pixels = np.empty(height * width * 3, np.uint8)
    at = pixels.ctypes.data
    if _LIBRARY.imdecode(buffer.ctypes.data, len(buffer), height, width, at, height, width, 0, 0, 1, 1, False, False):
        return False
    size = len(out)
    _LIBRARY.resize(0, at, height, width, top, top + h, left, left + w, out.data_ptr(), size, size)
    return True
