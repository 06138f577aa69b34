"""Images that say which way is up, bright at the top, and a rotation network that reads it from them."""

from pathlib import Path

import numpy as np
from PIL import Image

from fastrot.orient.network import Shows, Trust


def sky(height: int, width: int, seed: int = 0, up: bool = True) -> Image.Image:
    """Upright, sky above dark ground; or, where nothing is up, gray. Some noise, so that no two are alike."""
    noise = np.random.default_rng(seed).integers(0, 30, (height, width, 3))
    light = np.linspace(190, 30, height)[:, None, None] if up else 110
    return Image.fromarray((noise + light).astype(np.uint8))


def turned(image: Image.Image, turns: int) -> Image.Image:
    """By quarter turns counter-clockwise, as classes are counted."""
    how = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)[turns % 4]
    return image.transpose(how) if how is not None else image


class Compass:
    """A Network whose logits are how bright each side is: top, left, bottom, right, as turns bring the sky there."""

    says = "a compass"

    def __init__(self, size: int = 32, fit: str = "squash", trust: Trust | None = None):
        self.shows = Shows(size, fit, size * 8 // 7, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
        self.trust = trust or Trust()

    def logits(self, pixels):
        light = pixels.astype(np.float32).mean(3) / 16
        views = np.stack([np.rot90(light, turn, (1, 2)) for turn in range(4)], 1)  # [n, 4, S, S]
        half = views.shape[2] // 2
        sides = (views[..., :half, :], views[..., :half], views[..., half:, :], views[..., half:])
        return np.stack([side.mean((2, 3)) for side in sides], 2).astype(np.float32)


def write(folder: Path, turns: dict[str, int | None]) -> Path:
    """Photographs by name, turned so often; None: one that has no up."""
    for seed, (name, turn) in enumerate(turns.items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        turned(sky(48, 64, seed, turn is not None), turn or 0).save(folder / name, quality=95)
    return folder
