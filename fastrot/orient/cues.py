"""What is done to crops to learn which cues a network goes by: a cue taken away, or planted where nothing else tells the turn.

A crop is uint8 [S, S, 3]. What takes a cue away draws its directions at random, and is called on crops that lie any way up,
so that it leaves no cue of its own; what plants one does so in one direction of the crop as it is given.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from fastrot.data.corruptions import recoded, shifted

Crop = NDArray[np.uint8]
Act = Callable[[Crop, np.random.Generator], Crop]
_LUMA = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Cue:
    """name; does: what is done, for a person. box: what of the image is read for it, where that is not what is shown."""

    name: str
    does: str
    act: Act
    box: str = ""


def same(crop: Crop, rng: np.random.Generator) -> Crop:
    return crop


def _recoded(crop: Crop, rng: np.random.Generator, quality: int, subsampling: int) -> Crop:
    return recoded(np.ascontiguousarray(crop), quality, subsampling)


def _deblocked(crop: Crop, rng: np.random.Generator) -> Crop:
    return np.asarray(Image.fromarray(crop).filter(ImageFilter.MedianFilter(3)))


def _gray(crop: Crop, rng: np.random.Generator) -> Crop:
    return np.repeat(np.rint(crop @ _LUMA).astype(np.uint8)[..., None], 3, 2)


def _shuffled(crop: Crop, rng: np.random.Generator) -> Crop:
    return np.roll(crop, rng.integers(1, 3), 2)


def _fringed(crop: Crop, red: tuple[float, float], blue: tuple[float, float]) -> Crop:
    """Red and blue moved (down, right), pixels."""
    return np.stack([shifted(crop[..., 0], *red), crop[..., 1], shifted(crop[..., 2], *blue)], 2)


def _channels_moved(crop: Crop, rng: np.random.Generator) -> Crop:
    most = len(crop) / 32
    red, blue = rng.uniform(-most, most, (2, 2)).tolist()
    return _fringed(crop, red, blue)


def _fringes(crop: Crop, rng: np.random.Generator) -> Crop:
    """Red up, blue down."""
    by = len(crop) / 64
    return _fringed(crop, (-by, 0.0), (by, 0.0))


def _siting(crop: Crop, rng: np.random.Generator) -> Crop:
    """Both chroma planes half a pixel to the right, as where they are taken for centred and are not."""
    planes = np.array(Image.fromarray(crop).convert("YCbCr"))
    for plane in (1, 2):
        planes[..., plane] = shifted(planes[..., plane], 0.0, 0.5)
    return np.asarray(Image.fromarray(planes, "YCbCr").convert("RGB"))


def _lit(crop: Crop, gain: NDArray[np.float64]) -> Crop:
    return np.rint(crop * gain[..., None]).clip(0, 255).astype(np.uint8)


def _across(side: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Down and right of the centre, [S, S], -1 to 1 between the edges."""
    at = (2 * np.arange(side) + 1) / side - 1
    down, right = np.meshgrid(at, at, indexing="ij")
    return down, right


def _evened(crop: Crop, rng: np.random.Generator) -> Crop:
    """Every ring around the centre as bright as the whole crop."""
    down, right = _across(len(crop))
    ring = (np.hypot(down, right) * len(crop) / 8).astype(np.int64)
    luma = crop @ _LUMA
    means = np.bincount(ring.ravel(), luma.ravel()) / np.bincount(ring.ravel())
    return _lit(crop, ((luma.mean() + 1) / (means + 1))[ring])


def _flattened(crop: Crop, rng: np.random.Generator) -> Crop:
    """The plane that fits its brightness best is taken off."""
    luma = crop @ _LUMA
    ways = np.stack(_across(len(crop)), 2)
    slope = ways @ ((luma[..., None] * ways).sum((0, 1)) / (ways * ways).sum((0, 1)))
    flat: Crop = np.rint(crop - slope[..., None]).clip(0, 255).astype(np.uint8)
    return flat


def _vignetted(crop: Crop, rng: np.random.Generator) -> Crop:
    """Brightest above the middle, as a photograph that was cut at its top."""
    down, right = _across(len(crop))
    return _lit(crop, 1 / (1 + 0.25 * ((down + 0.6) ** 2 + right**2)) ** 2)


def _lit_from_above(crop: Crop, rng: np.random.Generator) -> Crop:
    return _lit(crop, 1 - 0.3 * _across(len(crop))[0])


def _part(crop: Crop, top: int, left: int, bottom: int, right: int) -> Crop:
    """Without so many pixels at the edges, at the old size."""
    side = len(crop)
    box = left, top, side - right, side - bottom
    return np.asarray(Image.fromarray(crop).resize((side, side), Image.Resampling.BILINEAR, box))


def _edges_cut(crop: Crop, rng: np.random.Generator) -> Crop:
    tenth = len(crop) // 10
    return _part(crop, tenth, tenth, tenth, tenth)


def _stretched(crop: Crop, rng: np.random.Generator) -> Crop:
    eighth = len(crop) // 8
    return _part(crop, eighth, 0, eighth, 0)


def _resampled(crop: Crop, rng: np.random.Generator, across: int, down: int) -> Crop:
    """Made smaller by these factors, then larger again, bicubic."""
    side = len(crop)
    small = Image.fromarray(crop).resize((side // across, side // down), Image.Resampling.BICUBIC)
    return np.asarray(small.resize((side, side), Image.Resampling.BICUBIC))


def _barred(crop: Crop, rng: np.random.Generator) -> Crop:
    out = crop.copy()
    out[-(len(crop) // 10) :] = 0
    return out


def _marked(crop: Crop, rng: np.random.Generator) -> Crop:
    """A caption at the bottom right, white on a dark edge."""
    image, side = Image.fromarray(crop), len(crop)
    font = ImageFont.load_default(max(8, side // 9))
    at = side - 2, side - 1
    ImageDraw.Draw(image).text(at, "© 2026", "white", font, "rd", stroke_width=1, stroke_fill="black")
    return np.asarray(image)


OFF_GRID, SQUARE = "off the grid", "square"
AS_IT_IS = Cue("as it is", "nothing", same)
TAKEN = (
    Cue(
        "JPEG's grid",
        "read from 3 pixels further down and right, then a JPEG again",
        partial(_recoded, quality=50, subsampling=2),
        OFF_GRID,
    ),
    Cue("JPEG's blocks", "median of 3 x 3 pixels", _deblocked),
    Cue("colour", "gray", _gray),
    Cue("colour by channel", "channels shuffled", _shuffled),
    Cue("colour fringes, chroma siting", "red and blue moved at random", _channels_moved),
    Cue("vignette", "every ring as bright as the whole", _evened),
    Cue("light from above", "the slope of brightness taken off", _flattened),
    Cue("borders, watermarks", "a tenth cut off at each edge", _edges_cut),
    Cue("resampling", "half the size and back, bicubic", partial(_resampled, across=2, down=2)),
    Cue("aspect", "the central square of the image alone", same, SQUARE),
    Cue("proportions", "stretched by 4:3, either way", _stretched),
)
PLANTED = (
    Cue("JPEG's tables, 4:2:2", "a JPEG of quality 30", partial(_recoded, quality=30, subsampling=1)),
    Cue("colour fringes", "red up, blue down", _fringes),
    Cue("chroma siting", "chroma half a pixel to the right", _siting),
    Cue("vignette", "brightest above the middle", _vignetted),
    Cue("light from above", "30% brighter at the top, darker at the bottom", _lit_from_above),
    Cue("border", "a black bar at the bottom", _barred),
    Cue("watermark", "a caption at the bottom right", _marked),
    Cue("resampling", "half as wide and back, bicubic", partial(_resampled, across=2, down=1)),
    Cue("proportions", "stretched upwards by 4:3", _stretched),
)
