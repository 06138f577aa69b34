"""Pixels among the buffers: nothing to decode, so another decoder resamples them."""

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from fastrot.data.decode.batch import Batch

if TYPE_CHECKING:
    from fastrot.data.decode import Decoder


class WithPixels:
    """A decoder of files; and one that takes pixels, uint8 [H, W, 3], made when the first come."""

    def __init__(self, files: "Decoder", make_pixels: Callable[[], "Decoder"]):
        self.name = files.name
        self._files, self._make_pixels = files, make_pixels
        self._pixels: Decoder | None = None
        self._flying: deque[tuple[list[int], list[int]]] = deque()

    def submit(self, batch: Batch) -> None:
        raw = [at for at, buffer in enumerate(batch.buffers) if buffer.ndim == 3]
        if not raw:
            self._files.submit(batch)
            self._flying.append((raw, []))
            return
        coded = [at for at, buffer in enumerate(batch.buffers) if buffer.ndim == 1]
        self._resampler().submit(batch.some(raw))
        if coded:
            self._files.submit(batch.some(coded))
        self._flying.append((raw, coded))

    def result(self) -> tuple[torch.Tensor, dict[int, str]]:
        raw, coded = self._flying.popleft()
        if not raw:
            return self._files.result()
        resampled, failed = self._resampler().result()
        if not coded:
            return resampled, failed
        decoded, bad = self._files.result()
        both = decoded.new_empty(len(raw) + len(coded), *decoded.shape[1:])
        both[raw], both[coded] = resampled.to(decoded.device), decoded
        return both, {raw[at]: why for at, why in failed.items()} | {coded[at]: why for at, why in bad.items()}

    def one(self, batch: Batch) -> torch.Tensor:
        return (self._resampler() if batch.buffers[0].ndim == 3 else self._files).one(batch)

    def close(self) -> None:
        self._files.close()
        if self._pixels:
            self._pixels.close()

    def _resampler(self) -> "Decoder":
        self._pixels = self._pixels or self._make_pixels()
        return self._pixels
