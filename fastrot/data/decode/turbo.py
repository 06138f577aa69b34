"""turbo: libjpeg-turbo decodes the window alone, one SIMD pass resamples; threads without the GIL.

The pixels' stated error against the torch decoder: none for upright JPEGs (bit for bit where both stand
on a libjpeg-turbo that filters chroma alike); a level of rounding where EXIF lays the image on its side.
`turbo_fast` first scales windows of at least twice the target in the DCT: on such windows of photographs
mean 1.2 levels, the worst image 4.
"""

from collections import deque

import torch

from fastrot.data.decode.batch import Batch
from fastrot.data.decode.torch import LeftToPillow, window_pixels
from fastrot.data.images import kind_of
from fastrot.errors import BadImage, UserError
from fastrot_kernels.build import BuildError
from fastrot_kernels.turbo import NOT_OURS, Turbo


def make(device: torch.device, threads: int, batch: int, depth: int) -> "TurboDecoder":
    return TurboDecoder(threads, fast=False)


def make_fast(device: torch.device, threads: int, batch: int, depth: int) -> "TurboDecoder":
    return TurboDecoder(threads, fast=True)


class TurboDecoder:
    """Three-component and gray JPEGs by `Turbo`; what it leaves, and what it refuses, goes to Pillow."""

    def __init__(self, threads: int, fast: bool):
        self.name = "turbo on the CPU" + (", large windows scaled in the DCT" if fast else "")
        try:
            self._turbo, self._alone = Turbo(threads, fast), Turbo(1, fast)
        except BuildError as error:
            raise UserError(f"data.decode turbo: cannot be built ({error})") from None
        self._flying: deque[Batch] = deque()
        self._left = LeftToPillow("turbo")

    def submit(self, batch: Batch) -> None:
        self._turbo.submit(batch.buffers, batch.orientations, batch.windows, batch.size)
        self._flying.append(batch)

    def result(self) -> tuple[torch.Tensor, dict[int, str]]:
        batch = self._flying.popleft()
        out, failed = self._turbo.result()
        pixels, bad = torch.from_numpy(out), {}
        for at, (outcome, _) in failed.items():
            if outcome == NOT_OURS:
                kind = kind_of(batch.buffers[at])
                self._left.say("JPEG of four colours" if kind == "JPEG" else kind)
            try:
                pixels[at] = window_pixels(*batch.image(at))
            except BadImage as error:
                bad[at] = str(error)
        return pixels, bad

    def one(self, batch: Batch) -> torch.Tensor:
        self._alone.submit(batch.buffers, batch.orientations, batch.windows, batch.size)
        out, failed = self._alone.result()
        return window_pixels(*batch.image(0)) if failed else torch.from_numpy(out[0])

    def close(self) -> None:
        self._turbo.close()
        self._alone.close()
