"""Colour jitter and lighting on the device; their parameters are part of the plan (data/augment.py)."""

from functools import cache

import torch
from torch import Tensor

_BRIGHTNESS, _CONTRAST, _SATURATION = 0, 1, 2
_GRAY = (19595.0, 38470.0, 7471.0)  # of 65,536: Pillow's convert("L"); every sum of these products is exact in fp32
# eigenvalues and eigenvectors (rows R, G, B) of ImageNet's colours; Krizhevsky et al. 2012, protocol "Linear heads"
_VALUES = (0.2175, 0.0188, 0.0045)
_VECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


@cache
def _constant(values: tuple[float | tuple[float, ...], ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copied once: each copy of a list makes the host wait."""
    return torch.tensor(values, dtype=dtype, device=device)


def jitter(images: Tensor, order: Tensor, factors: Tensor) -> Tensor:
    """Brightness, contrast and saturation of each image in its own order, as Pillow's ImageEnhance on bytes.

    images  fp32 [n, 3, H, W], whole numbers 0..255; so is what it returns: each operation cuts fractions off.
    order   int64 [n, 4]: which of 0 brightness, 1 contrast, 2 saturation, 3 hue comes first to last.
    factors [n, 4] of those four, by number; the hue's is not used: the protocol's is 0.
    """
    factors = factors.to(images).gather(1, order)
    gray_of = _constant(_GRAY, images.dtype, images.device).view(1, 3, 1, 1)
    for place in range(order.shape[1]):
        which = order[:, place, None, None, None]
        factor = torch.where(which <= _SATURATION, factors[:, place, None, None, None], 1.0)
        gray = (((images * gray_of).sum(1, keepdim=True) + 32768) / 65536).floor()
        mean = (gray.double().mean((2, 3), keepdim=True) + 0.5).floor().to(gray)
        other = torch.where(which == _CONTRAST, mean, gray)
        other = torch.where(which == _BRIGHTNESS, 0.0, other)
        images = (other + factor * (images - other)).clamp(0, 255).floor()
    return images


def lighting(images: Tensor, alpha: Tensor) -> Tensor:
    """Each image plus its sum of principal colours; images [n, 3, H, W] in [0, 1], alpha [n, 3]."""
    values, vectors = (_constant(c, images.dtype, images.device) for c in (_VALUES, _VECTORS))
    shift = (alpha.to(images) * values) @ vectors.T
    return images + shift[:, :, None, None]
