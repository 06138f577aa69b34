"""Pixels among the buffers: nothing to decode, so they are cropped and resized by threads here."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fastrot.errors import BadImage


def window_of_pixels(pixels: NDArray[np.uint8], window: NDArray, out: torch.Tensor) -> None:
    """One crop of uint8 [H, W, 3] into `out` uint8 [size, size, 3]: an integer window cropped and
    resized (antialiased bilinear), or a float64 box resized by Pillow's `resize(box=)`.

    Raises BadImage where the window leaves the image.
    """
    size = len(out)
    height, width = pixels.shape[:2]
    if window.dtype == np.float64:
        top, left, h, w = window
        box = (max(left, 0), max(top, 0), min(left + w, width), min(top + h, height))
        image = Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR, box)
        out.copy_(torch.from_numpy(np.array(image)))
        return
    top, left, h, w = window.tolist()
    if top + h > height or left + w > width:
        raise BadImage(f"is {width}x{height}, not as indexed")
    crop = torch.from_numpy(pixels)[top : top + h, left : left + w].permute(2, 0, 1)[None]
    torch._C._nn._upsample_bilinear2d_aa(crop, [size, size], False, out=out.permute(2, 0, 1)[None])


class WithPixels:
    """A decoder, and threads for the buffers that are pixels: uint8 [H, W, 3]."""

    def __init__(self, decoder, threads: int):
        self.name = decoder.name
        self._decoder, self._threads = decoder, threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="resize")
        self._flying: deque[tuple[list[int], list[int], torch.Tensor, list[Future]]] = deque()

    def submit(self, buffers, windows, size) -> None:
        pixels = [at for at, buffer in enumerate(buffers) if buffer.ndim == 3]
        coded = [at for at, buffer in enumerate(buffers) if buffer.ndim == 1]
        if coded or not pixels:
            self._decoder.submit([buffers[at] for at in coded], windows[coded], size)
        out = torch.empty(len(pixels), size, size, 3, dtype=torch.uint8)

        def work(first: int) -> dict[int, str]:
            bad = {}
            for to in range(first, len(pixels), self._threads):
                at = pixels[to]
                try:
                    window_of_pixels(buffers[at], windows[at], out[to])
                except BadImage as error:
                    bad[at] = str(error)
            return bad

        tasks = [self._pool.submit(work, first) for first in range(min(self._threads, len(pixels)))]
        self._flying.append((pixels, coded, out, tasks))

    def result(self):
        pixels, coded, out, tasks = self._flying.popleft()
        bad = {at: reason for task in tasks for at, reason in task.result().items()}
        if pixels and not coded:
            return out, bad
        decoded, failed = self._decoder.result()
        if not pixels:
            return decoded, failed
        both = decoded.new_empty(len(pixels) + len(coded), *out.shape[1:])
        both[pixels], both[coded] = out.to(decoded.device), decoded
        return both, bad | {coded[at]: reason for at, reason in failed.items()}

    def one(self, buffer, window, size):
        if buffer.ndim == 1:
            return self._decoder.one(buffer, window, size)
        out = torch.empty(size, size, 3, dtype=torch.uint8)
        window_of_pixels(buffer, window[0], out)
        return out

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._decoder.close()
