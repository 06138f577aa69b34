"""Pixels among the buffers: nothing to decode, so another decoder resamples them."""

from collections import deque
from collections.abc import Callable


class WithPixels:
    """A decoder of files; and one that takes pixels, uint8 [H, W, 3], made when the first come."""

    def __init__(self, files, make_pixels: Callable):
        self.name = files.name
        self._files, self._make_pixels, self._pixels = files, make_pixels, None
        self._flying: deque[tuple[list[int], list[int]]] = deque()

    def submit(self, buffers, windows, size) -> None:
        raw = [at for at, buffer in enumerate(buffers) if buffer.ndim == 3]
        coded = [at for at, buffer in enumerate(buffers) if buffer.ndim == 1]
        if raw:
            self._resampler().submit([buffers[at] for at in raw], windows[raw], size)
        if coded or not raw:
            self._files.submit([buffers[at] for at in coded], windows[coded], size)
        self._flying.append((raw, coded))

    def result(self):
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

    def one(self, buffer, window, size):
        return (self._resampler() if buffer.ndim == 3 else self._files).one(buffer, window, size)

    def close(self) -> None:
        self._files.close()
        if self._pixels:
            self._pixels.close()

    def _resampler(self):
        self._pixels = self._pixels or self._make_pixels()
        return self._pixels
