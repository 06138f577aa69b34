"""The page's pictures: first-layer filters, images with their nearest neighbours. All as data URIs."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fastrot.data.images import decode_upright
from fastrot.data.manifest import Manifest
from fastrot.data.storage import FileStorage
from fastrot.errors import BadImage
from fastrot.features.read import FeatureStore
from fastrot.probes.neighbours import neighbours
from fastrot.templates import data_uri

_THUMB = 84  # pixels
_ZOOM = 6  # of a filter's pixel
NEIGHBOURS = 5


@dataclass(frozen=True)
class Picture:
    """An image as a data URI, empty where its file is gone, and its class's name."""

    uri: str
    name: str


@dataclass(frozen=True)
class Neighbours:
    """asked: images of the test set; nearest: backbone -> for each of them the nearest of the training set, best first."""

    title: str
    asked: list[Picture]
    nearest: dict[str, list[list[Picture]]]


def filters(weight: torch.Tensor, columns: int = 16) -> str:
    """conv1's weights [n, 3, 7, 7] as one PNG, each filter stretched to its own range and centred at gray."""
    n, _, side, _ = weight.shape
    largest = weight.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-12)
    tiles = ((weight / largest + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    tiles = tiles.repeat(_ZOOM, 1).repeat(_ZOOM, 2)
    pitch = side * _ZOOM + 2
    rows = -(-n // columns)
    sheet = np.full((rows * pitch - 2, columns * pitch - 2, 4), 0, np.uint8)
    for at, tile in enumerate(tiles):
        top, left = at // columns * pitch, at % columns * pitch
        sheet[top : top + len(tile), left : left + len(tile)] = np.dstack(
            [tile, np.full(tile.shape[:2], 255, np.uint8)]
        )
    return data_uri(Image.fromarray(sheet), "PNG")


def queries(labels: NDArray[np.integer], count: int) -> list[int]:
    """Rows to show: the first of each class, spread over the classes."""
    _, first = np.unique(labels, return_index=True)
    return sorted(int(row) for row in first)[:count]


def neighbour_rows(bank: FeatureStore, asked: FeatureStore, rows: list[int], tap: str) -> list[list[int]]:
    """The nearest rows of `bank` to each asked row, best first."""
    _, found = neighbours(bank.features[tap], np.asarray(asked.features[tap][rows]), NEIGHBOURS)
    return found.tolist()


def shown(store: FeatureStore, rows: list[int]) -> list[Picture]:
    """Images of a store with their classes; a list of files has numbers for names."""
    labels = [int(store.labels[row]) for row in rows]
    names = [store.classes[label].replace("_", " ") if store.classes else str(label) for label in labels]
    return [Picture(uri, name) for uri, name in zip(_thumbnails(store.folder, rows), names, strict=True)]


def _thumbnails(store: Path, rows: list[int]) -> list[str]:
    """Images of a store as small JPEGs, squared by their centre; one that is gone is an empty string."""
    manifest = Manifest.load(store / "rows")
    storage, out = FileStorage(manifest), []
    for buffer in storage.read(np.array(rows)):
        try:
            if isinstance(buffer, BadImage):
                raise buffer
            image = decode_upright(buffer)
        except BadImage:
            out.append("")
            continue
        out.append(_squared(image))
    storage.close()
    return out


def thumbnail(pixels: NDArray[np.uint8]) -> str:
    """One image, uint8 [H, W, 3], as a small JPEG, squared by its centre."""
    return _squared(Image.fromarray(np.ascontiguousarray(pixels)))


def _squared(image: Image.Image) -> str:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return data_uri(image.resize((_THUMB, _THUMB), Image.Resampling.BILINEAR, box), "JPEG")
