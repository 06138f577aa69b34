"""The SVM protocol's picture: short side resized, then the whole squashed to a square, both by Pillow."""

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fastrot.data.decode.torch import TorchDecoder
from fastrot.data.images import decode_upright


def make(threads: int, short: int) -> TorchDecoder:
    """A decoder that shows the whole image whatever the window. It is no choice of data.decode."""
    return TorchDecoder(threads, partial(squashed_pixels, short=short), "Pillow on the CPU, resized twice")


def squashed_pixels(
    buffer: NDArray[np.uint8], orientation: int, _window: NDArray[Any], size: int, short: int
) -> torch.Tensor:
    """uint8 [size, size, 3]: Resize(short), long side truncated, then Resize((size, size)), PIL bilinear.

    Raises BadImage. Source: protocol "VOC07 SVM and low-shot", Features.
    """
    image = decode_upright(buffer, orientation)
    least = min(image.size)
    between = short * image.width // least, short * image.height // least
    for target in (between, (size, size)):
        image = image.resize(target, Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image))
