"""EXIF's orientations 1..8: stored pixels made upright, and an upright window found among them."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

_FROM_BELOW, _FROM_RIGHT = (3, 4, 6, 7), (2, 3, 7, 8)  # how the upright image reads the stored one
_LYING = 5  # from here on its rows are stored columns


def upright(pixels: torch.Tensor, orientation: int, rows: int, columns: int) -> torch.Tensor:
    """Stored pixels as they should be seen; a view where it can be. rows, columns: which dimensions these are."""
    flipped = [rows] * (orientation in _FROM_BELOW) + [columns] * (orientation in _FROM_RIGHT)
    pixels = pixels.flip(flipped) if flipped else pixels
    return pixels.transpose(rows, columns) if orientation >= _LYING else pixels


def stored_window(window: NDArray[Any], orientation: int, height: int, width: int) -> NDArray[Any]:
    """A window (top, left, height, width) of the upright image, in a stored image of height x width; it may leave it."""
    top, left, h, w = window.tolist()
    if orientation >= _LYING:
        top, left, h, w = left, top, w, h
    top = height - top - h if orientation in _FROM_BELOW else top
    left = width - left - w if orientation in _FROM_RIGHT else left
    return np.array((top, left, h, w), window.dtype)
