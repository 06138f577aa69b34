"""A source shown to a rotation network: an answer an image, in the source's order."""

import os
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fastrot import machine, terminal
from fastrot.config import Data
from fastrot.data import boxes
from fastrot.data.augment import central_boxes, whole_boxes
from fastrot.data.images import KINDS, UNKNOWN
from fastrot.data.index import in_cache
from fastrot.data.manifest import Manifest
from fastrot.data.remarks import describe
from fastrot.data.scan import Track
from fastrot.data.sources import shards_of
from fastrot.errors import UserError
from fastrot.orient.answers import Answer, Unread, answer, combined, normalised
from fastrot.orient.network import Network, Shows

_IMAGES = 32  # a batch, of four views each
_NO_TAG_READ = (KINDS.index("TIFF"), KINDS.index("RAW"))  # Pillow turns the one itself; the others are pixels


@dataclass(frozen=True)
class Source:
    """Images and what they are called. top: the folder that they lie in, at any depth; None where they are no folder's."""

    manifest: Manifest
    top: str | None

    @classmethod
    def open(cls, source: str, track: Track) -> "Source":
        """A folder, with all that is below it, or any other source of data.train. Raises UserError, Fault."""
        folder = os.path.isdir(source)
        found = in_cache(f"images:{source}" if folder else source, Data().max_pixels, "SOURCE", track)
        return cls(Manifest.load(found), os.path.abspath(source) if folder else None)

    def file(self, row: int) -> str:
        """Absolute path; of an image inside a shard, the shard and the offset."""
        path = os.fsdecode(self.manifest.path(row))
        return path if self.whole_files else f"{path} at byte {self.manifest.offset[row]}"

    @cached_property
    def whole_files(self) -> bool:
        """Whether each image is a file of its own."""
        return shards_of(self.manifest.source) is None

    def group(self, row: int) -> str | None:
        """The folder below the top one, or the class; None where there is none."""
        if self.top is not None:
            return self.folder(os.fsdecode(self.manifest.path(row)))
        label, classes = self.manifest.label[row], self.manifest.classes
        return classes[label] if label.ndim == 0 and 0 <= label < len(classes) else None

    def folder(self, path: str) -> str | None:
        """The folder below the top one that a path lies in."""
        if self.top is None:
            return None
        first, *rest = os.path.relpath(path, self.top).split(os.sep)
        return first if rest else None

    def exif(self, row: int) -> int | None:
        """The orientation by which an image is shown; None where the manifest does not know its tag."""
        orientation = int(self.manifest.orientation[row])
        return None if orientation == UNKNOWN or self.manifest.kind[row] in _NO_TAG_READ else orientation


def opened(source: str) -> Source:
    """`Source.open`, with its progress and what is odd about the images, for a person."""
    found = Source.open(source, terminal.track)
    describe(found.manifest, lambda line: terminal.console().print(line, soft_wrap=True, markup=False))
    return found


@dataclass(frozen=True)
class Looked:
    """Some rows, int64 [n]; logits float32 [n, 4 shown, 4]; unread {row: why}, which are not among them."""

    rows: NDArray[np.int64]
    logits: NDArray[np.float32]
    unread: dict[int, str]


def looked(manifest: Manifest, network: Network) -> Generator[Looked, None, None]:
    """What a network says of all rows, in order, all four turns of each, a batch at a time. Raises UserError, Fault."""
    n = len(manifest)
    parts = (np.arange(at, min(at + _IMAGES, n)) for at in range(0, n, _IMAGES))

    def boxes_of(rows: NDArray[np.int64]) -> NDArray[np.float64]:
        return boxes_shown(network.shows, manifest.height[rows], manifest.width[rows])

    with closing(
        boxes.shown(manifest, parts, boxes_of, network.shows.size, machine.cores(), Data().timeout)
    ) as batches:
        for batch in batches:
            logits = network.logits(batch.pixels) if len(batch.rows) else np.zeros((0, 4, 4), np.float32)
            if not np.isfinite(logits).all():
                raise UserError(f"{network.says}: gives what is no number; take another checkpoint")
            yield Looked(batch.rows, logits, batch.unread)


def boxes_shown(shows: Shows, heights: NDArray[np.int32], widths: NDArray[np.int32]) -> NDArray[np.float64]:
    """Of upright images of these sizes, float64 [n, 4] (top, left, height, width): what is resized to the network's size."""
    if shows.fit == "squash":
        return whole_boxes(heights, widths)
    return central_boxes(heights, widths, shows.resize, shows.size)


def answers(source: Source, network: Network, least: float | None = None) -> Generator[Answer | Unread, None, None]:
    """An answer for each image, in order, or why it cannot be read; those that were unsound at indexing come first.

    least  probability from which an answer counts; None: the network's own.
    """
    for name, reason in source.manifest.quarantined:
        yield Unread(name, source.folder(name), reason)
    trust = network.trust
    least = trust.threshold if least is None else least
    with closing(looked(source.manifest, network)) as batches:
        for batch in batches:
            for row, reason in batch.unread.items():
                yield Unread(source.file(row), source.group(row), reason)
            turns = normalised(combined(batch.logits), trust.temperature)
            for row, of_turns in zip(batch.rows.tolist(), turns, strict=True):
                yield answer(source.file(row), row, source.group(row), source.exif(row), of_turns, least)
