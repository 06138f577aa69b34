"""The contact sheet: some images as they are and as they would be, the doubtful first; one HTML file that needs no other."""

import io
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fastrot.data.images import known, open_image, upright
from fastrot.data.manifest import Manifest
from fastrot.data.storage import FileStorage
from fastrot.errors import BadImage
from fastrot.files import as_words, write_text
from fastrot.orient.answers import Answer, Unread
from fastrot.orient.looking import Source
from fastrot.orient.tally import HEADER, Tally
from fastrot.templates import data_uri, template

_MOST = 60  # pictures of each kind
_SIDE = 160  # pixels, the longer of a picture
_CLOCKWISE = {90: Image.Transpose.ROTATE_270, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_90}
_KINDS = {"undecided": "Undecided", "turned": "To be turned"}


@dataclass(frozen=True)
class _Picture:
    """name; before, after: JPEGs as data: URIs; says: a line on what is known."""

    name: str
    before: str
    after: str
    says: str


class Sheet:
    """Keeps the least sure answers of each kind, and the first files that cannot be read."""

    def __init__(self, source: Source):
        self._source = source
        self._kept: dict[str, list[Answer]] = {kind: [] for kind in _KINDS}
        self._unread: list[Unread] = []

    def add(self, one: Answer | Unread) -> None:
        if isinstance(one, Unread):
            self._unread += [one][: _MOST - len(self._unread)]
        elif not one.decided or one.clockwise:
            kept = self._kept["turned" if one.decided else "undecided"]
            kept.append(one)
            if len(kept) > 2 * _MOST:  # sorted now and then, so that a million cost little
                kept[:] = _least_sure(kept)

    def save(self, path: Path, tally: Tally, network: str) -> None:
        """Write the page. network: what gave the answers. Raises OSError."""
        counts = Counter({"undecided": tally["undecided"], "turned": tally.turned})
        with closing(FileStorage(self._source.manifest)) as storage:
            parts = [
                (title, counts[kind], list(self._pictures(storage, self._kept[kind]))) for kind, title in _KINDS.items()
            ]
        page = template("fastrot.orient", "sheet.html").render(
            source=as_words(self._source.manifest.source.removeprefix("images:")),
            network=as_words(network),
            header=HEADER,
            rows=tally.rows(),
            tags=list(tally.tags.items()),
            parts=parts,
            unread=[(self._name(one.file), one.unreadable) for one in self._unread],
            unreadable=tally["unreadable"],
        )
        write_text(path, page)

    def _pictures(self, storage: FileStorage, answers: list[Answer]) -> Iterator[_Picture]:
        for one in _least_sure(answers):
            image = thumbnail(self._source.manifest, storage, one.row)
            if image:
                turned = image.transpose(_CLOCKWISE[one.clockwise]) if one.clockwise else image
                yield _Picture(self._name(one.file), data_uri(image, "JPEG"), data_uri(turned, "JPEG"), _says(one))

    def _name(self, file: str) -> str:
        top = self._source.top
        return as_words(os.path.relpath(file, top) if top is not None and os.path.isabs(file) else file)


def _least_sure(answers: list[Answer]) -> list[Answer]:
    return sorted(answers, key=lambda one: (one.confidence, one.row))[:_MOST]


def _says(one: Answer) -> str:
    turn = f"turn {one.clockwise}° clockwise" if one.clockwise else "upright"
    tag = {"right": f", EXIF {one.exif} is right", "wrong": f", EXIF {one.exif} is wrong"}.get(one.tag, "")
    return f"{100 * one.confidence:.0f}% {turn}{tag}"


def thumbnail(manifest: Manifest, storage: FileStorage, row: int) -> Image.Image | None:
    """A row's image, small and upright; None where it can be read no more."""
    (buffer,) = storage.read(np.array([row]))
    if isinstance(buffer, BadImage):
        return None
    if buffer.ndim == 3:
        image = Image.fromarray(buffer)
    else:
        try:
            image = open_image(io.BytesIO(buffer))
            image.draft(None, (2 * _SIDE, 2 * _SIDE))  # a JPEG need not be decoded whole for it
            image = upright(image, known(int(manifest.orientation[row]), buffer))
        except BadImage:
            return None
    image.thumbnail((_SIDE, _SIDE))
    return image
