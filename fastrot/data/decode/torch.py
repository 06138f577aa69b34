"""torchvision on the CPU: the oracle of the pixels."""

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fastrot.data.decode.batch import Batch
from fastrot.data.decode.orientation import upright
from fastrot.data.images import boxed, decode_upright, kind_of
from fastrot.data.jpeg import frame_of
from fastrot.errors import BadImage

log = logging.getLogger(__name__)


def make(device: torch.device, threads: int, batch: int, depth: int) -> "TorchDecoder":
    import torchvision.io  # noqa: F401  where it is missing, that is found out here

    return TorchDecoder(threads)


def upright_pixels(buffer: NDArray[np.uint8], orientation: int) -> torch.Tensor:
    """The whole upright image, uint8 [3, H, W]; usual JPEGs by torchvision, anything else by Pillow, pixels as they are.

    Raises BadImage.
    """
    if buffer.ndim == 3:
        return torch.from_numpy(buffer).permute(2, 0, 1)
    if kind_of(buffer) == "JPEG" and (frame := frame_of(buffer)) and frame.usual:
        try:
            from torchvision.io import ImageReadMode, decode_jpeg  # seconds, which other decoders need not pay

            stored = decode_jpeg(torch.from_numpy(buffer), ImageReadMode.RGB)
        except RuntimeError as error:
            raise BadImage(f"cannot be decoded ({str(error).splitlines()[0]})") from None
        return upright(stored, orientation, 1, 2)
    return torch.from_numpy(np.array(decode_upright(buffer, orientation))).permute(2, 0, 1)


def window_pixels(buffer: NDArray[np.uint8], orientation: int, window: NDArray[Any], size: int) -> torch.Tensor:
    """One crop, uint8 [size, size, 3]: an integer window cropped and resized (antialiased
    bilinear), or a float64 box resized by Pillow's `resize(box=)`.

    Raises BadImage.
    """
    pixels = upright_pixels(buffer, orientation)
    if window.dtype == np.float64:
        return torch.from_numpy(boxed(Image.fromarray(pixels.permute(1, 2, 0).numpy()), window, size))
    top, left, height, width = (int(v) for v in window)
    if top + height > pixels.shape[1] or left + width > pixels.shape[2]:
        raise BadImage(f"is {pixels.shape[2]}x{pixels.shape[1]}, not as indexed")
    from torchvision.transforms.v2 import functional as F

    crop: torch.Tensor = F.resized_crop(pixels, top, left, height, width, [size, size], antialias=True)
    return crop.permute(1, 2, 0)


class LeftToPillow:
    """The kinds of image that a decoder leaves to `window_pixels`: each is said once."""

    def __init__(self, decoder: str):
        self._decoder = decoder
        self._said: set[str] = set()

    def say(self, kind: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            log.warning("%s does not decode images of kind %s here; they go through Pillow", self._decoder, kind)


class TorchDecoder:
    """A pool of threads, one image a task.

    pixels_of(buffer, orientation, window, size) -> uint8 [size, size, 3]; raises BadImage.
    """

    def __init__(
        self, threads: int, pixels_of: Callable[..., torch.Tensor] = window_pixels, name: str = "torch on the CPU"
    ):
        self.name, self._pixels_of = name, pixels_of
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._flying: deque[tuple[list[Future[torch.Tensor]], int]] = deque()

    def submit(self, batch: Batch) -> None:
        tasks = [self._pool.submit(self._pixels_of, *batch.image(at)) for at in range(len(batch))]
        self._flying.append((tasks, batch.size))

    def result(self) -> tuple[torch.Tensor, dict[int, str]]:
        tasks, size = self._flying.popleft()
        out = torch.zeros(len(tasks), size, size, 3, dtype=torch.uint8)
        bad = {}
        for at, task in enumerate(tasks):
            try:
                out[at] = task.result()
            except BadImage as error:
                bad[at] = str(error)
        return out, bad

    def one(self, batch: Batch) -> torch.Tensor:
        return self._pixels_of(*batch.image(0))

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
