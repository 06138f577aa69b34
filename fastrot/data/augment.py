"""What happens to a row in an epoch: window, flip, turns, colour; and where evaluation looks."""

import itertools

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastrot.data.randomness import CROP, FLIP, JITTER, LIGHTING, TURN, below, philox, uniform

_ATTEMPTS = 10
_JITTER_ORDERS = np.array(list(itertools.permutations(range(4))), np.int64)


def crop_windows(
    seed: int,
    rows: NDArray[np.int64],
    epochs: NDArray[np.int64],
    heights: NDArray[np.int32],
    widths: NDArray[np.int32],
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    squash: bool = False,
) -> NDArray[np.int32]:
    """Random windows by torchvision's RandomResizedCrop law, int32 [n, 4]: top, left, height, width.

    heights, widths are those of the upright image; all inputs are [n].
    squash: `ratio` is in terms of the image's own width / height.
    Source: torchvision.transforms.RandomResizedCrop.get_params (ten attempts, then the centre).
    """
    tall, wide = heights.astype(np.float64), widths.astype(np.float64)
    own = wide / tall if squash else np.ones(len(rows))
    out = _central_windows(heights.astype(np.int64), widths.astype(np.int64), ratio, own)
    left_over = np.arange(len(rows))
    log_ratio = np.log(ratio)
    for attempt in range(_ATTEMPTS):
        if not len(left_over):
            break
        h_image, w_image = tall[left_over], wide[left_over]
        words = philox(seed, rows[left_over], epochs[left_over], CROP, attempt)
        u = uniform(words)
        area = h_image * w_image * (scale[0] + (scale[1] - scale[0]) * u[:, 0])
        aspect = own[left_over] * np.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * u[:, 1])
        w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        fits = (w > 0) & (w <= w_image) & (h > 0) & (h <= h_image)
        h, w = h[fits].astype(np.int64), w[fits].astype(np.int64)
        top = below(words[fits, 2], h_image[fits].astype(np.int64) - h + 1)
        left = below(words[fits, 3], w_image[fits].astype(np.int64) - w + 1)
        out[left_over[fits]] = np.stack([top, left, h, w], axis=1)
        left_over = left_over[~fits]
    return out.astype(np.int32)


def _central_windows(
    heights: NDArray[np.int64], widths: NDArray[np.int64], ratio: tuple[float, float], own: NDArray[np.float64]
) -> NDArray[np.int64]:
    """The largest central windows whose width / height lies within `ratio` times `own`, int64 [n, 4]."""
    aspect, least, most = widths / heights, ratio[0] * own, ratio[1] * own
    h = np.where(aspect < least, np.rint(widths / least), heights).astype(np.int64)
    w = np.where(aspect > most, np.rint(heights * most), widths).astype(np.int64)
    return np.stack([(heights - h) // 2, (widths - w) // 2, h, w], axis=1)


def shifted_boxes(
    seed: int,
    rows: NDArray[np.int64],
    epochs: NDArray[np.int64],
    heights: NDArray[np.int32],
    widths: NDArray[np.int32],
    short: int,
    crop: int,
) -> NDArray[np.float64]:
    """Boxes that Resize(short) + CenterCrop(short) + RandomCrop(crop) shows, float64 [n, 4], as central_boxes has them.

    Source: protocol "Linear heads", Places205.
    """
    words = philox(seed, rows, epochs, CROP)
    down, right = below(words[:, 2], short - crop + 1), below(words[:, 3], short - crop + 1)
    boxes = central_boxes(heights, widths, short, short)
    boxes[:, :2] += np.stack([down, right], axis=1) * (boxes[:, 2:] / short)
    boxes[:, 2:] *= crop / short
    return boxes


def flips(seed: int, rows: NDArray[np.int64], epochs: ArrayLike, probability: float = 0.5) -> NDArray[np.uint8]:
    """Whether each image is mirrored left-right, uint8 [n] in {0, 1}."""
    return (uniform(philox(seed, rows, epochs, FLIP)[:, 0]) < probability).astype(np.uint8)


def turns(seed: int, rows: NDArray[np.int64], epochs: ArrayLike, views: str) -> NDArray[np.uint8]:
    """Quarter turns counter-clockwise (= labels), uint8 [n, V].

    views "all": 0, 1, 2, 3 for every image; "one": a random turn per image.
    """
    if views == "all":
        return np.tile(np.arange(4, dtype=np.uint8), (len(rows), 1))
    return (philox(seed, rows, epochs, TURN)[:, :1] >> np.uint32(30)).astype(np.uint8)


def colour_jitter(
    seed: int, rows: NDArray[np.int64], epochs: ArrayLike, strength: float, hue: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Order [n, 4] of (0 brightness, 1 contrast, 2 saturation, 3 hue) and their factors [n, 4].

    Factors of the first three lie in 1 +- strength, the hue's shift in +- hue.
    Source: torchvision.transforms.ColorJitter; protocol "Linear heads".
    """
    order = _JITTER_ORDERS[below(philox(seed, rows, epochs, JITTER)[:, 0], 24)]
    u = uniform(philox(seed, rows, epochs, JITTER, 1))
    factors = 1 - strength + 2 * strength * u
    factors[:, 3] = hue * (2 * u[:, 3] - 1)
    return order, factors


def lighting(seed: int, rows: NDArray[np.int64], epochs: ArrayLike, std: float) -> NDArray[np.float64]:
    """PCA lighting weights alpha ~ N(0, std^2), float64 [n, 3], by Box and Muller.

    Source: Krizhevsky et al. 2012, section 4.1; protocol "Linear heads".
    """
    u = uniform(philox(seed, rows, epochs, LIGHTING))
    radius = std * np.sqrt(-2 * np.log1p(-u[:, [0, 0, 2]]))
    angle = 2 * np.pi * u[:, [1, 1, 3]]
    waves = [np.cos(angle[:, 0]), np.sin(angle[:, 1]), np.cos(angle[:, 2])]
    weights: NDArray[np.float64] = radius * np.stack(waves, axis=1)
    return weights


def whole_boxes(heights: NDArray[np.int32], widths: NDArray[np.int32]) -> NDArray[np.float64]:
    """Boxes of the whole upright images, float64 [n, 4], as central_boxes has them."""
    none = np.zeros(len(heights))
    return np.stack([none, none, heights, widths], axis=1)


def central_boxes(heights: NDArray[np.int32], widths: NDArray[np.int32], short: int, crop: int) -> NDArray[np.float64]:
    """Boxes of the upright image that Resize(short) + CenterCrop(crop) shows, float64 [n, 4].

    top, left, height, width in source pixels, to be resized to crop x crop in one step.
    Source: torchvision's Resize (long side truncated) and CenterCrop (half to even).
    """
    heights, widths = heights.astype(np.int64), widths.astype(np.int64)
    least = np.minimum(heights, widths)
    h, w = short * heights // least, short * widths // least
    down, right = heights / h, widths / w
    top, left = np.rint((h - crop) / 2) * down, np.rint((w - crop) / 2) * right
    return np.stack([top, left, crop * down, crop * right], axis=1)
