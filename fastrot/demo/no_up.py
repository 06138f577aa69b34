"""Pictures that have no up: noise, sky from above, textures. Drawn from a seed, and alike in no two turns but by chance."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

KINDS = ("noise", "clouds", "weave", "pebbles")


def draw(index: int, seed: int, side: int = 128) -> Image.Image:
    """Picture `index` of a set, side x side, of kind index % 4; turned at random, so that nothing drawn has a favourite."""
    rng = np.random.Generator(np.random.PCG64([seed, index, 15]))
    kind = KINDS[index % len(KINDS)]
    if kind == "noise":
        light = rng.normal(0, 1, (side, side))
    elif kind == "clouds":
        light = np.sum([_smooth(rng, side, cells) / cells for cells in (2, 4, 8, 16, 32)], 0)
    elif kind == "weave":
        y, x = np.mgrid[:side, :side] * rng.uniform(0.2, 0.7)
        light = np.sin(x + rng.uniform(0, 6)) * np.sin(y + rng.uniform(0, 6)) + 0.3 * _smooth(rng, side, 16)
    else:
        centres = rng.uniform(0, side, (side // 2, 2))
        grid = np.argwhere(np.ones((side, side)))[:, None]
        light = -np.sqrt(((grid - centres) ** 2).sum(2).min(1)).reshape(side, side)
    light = (light - light.mean()) / (light.std() + 1e-9)
    low, high = rng.uniform(0, 255, (2, 3))
    pixels = low + (high - low) * (0.5 + 0.25 * light[..., None]) + rng.normal(0, 4, (side, side, 3))
    return Image.fromarray(np.rot90(pixels.clip(0, 255).astype(np.uint8), int(rng.integers(4))).copy())


def _smooth(rng: np.random.Generator, side: int, cells: int) -> NDArray[np.float64]:
    """Values of a coarse grid, joined smoothly, [side, side]."""
    coarse = Image.fromarray(rng.normal(0, 1, (cells + 1, cells + 1)).astype(np.float32))
    return np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), np.float64)


def write(folder: str | Path, count: int, seed: int, side: int = 128) -> None:
    """count JPEGs into a folder, made where it is not there. Raises OSError."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        draw(index, seed, side).save(Path(folder) / f"{KINDS[index % len(KINDS)]}-{index:05d}.jpg", quality=85)
