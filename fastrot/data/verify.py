"""Decoding every image of a manifest in full, and quarantining what is damaged."""

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrot.data import beton, scan
from fastrot.data.images import decode_upright, kind_of
from fastrot.data.manifest import COLUMNS, HEAD, Manifest, content_hash
from fastrot.data.storage import FileStorage
from fastrot.errors import BadImage, Unreadable, UserError

# libjpeg's warnings of damaged data (jerror.h); others speak of odd headers, or of an ICC profile
_DAMAGE = ("Corrupt JPEG data", "Premature end of JPEG file")
_HARMLESS = "bad ICC marker"


def damage_of(jpeg: NDArray[np.uint8] | bytes) -> str:
    """libjpeg's first warning of damaged data in a JPEG, which Pillow and torchvision keep to themselves; "" = none.

    Some damage cannot be seen: bits that decode as other coefficients and leave the decoder in step, and a
    progressive file cut between two scans.
    A form that libjpeg-turbo's simple interface refuses, but Pillow decodes, is Pillow's to judge.
    """
    import simplejpeg  # only decoding in full needs it

    try:
        space = simplejpeg.decode_jpeg_header(jpeg)[2]
        # luma alone: all entropy-coded data are read, half the arithmetic is saved
        simplejpeg.decode_jpeg(jpeg, "CMYK" if space in ("CMYK", "YCCK") else "GRAY", strict=True)
    except ValueError as error:
        said = str(error)
        return said if said.startswith(_DAMAGE) and _HARMLESS not in said else ""
    return ""


def verify(folder: Path, track: scan.Track) -> list[list[str]]:
    """[place, reason] of every row that cannot be decoded in full and found free of damage.

    Where there are such rows the manifest in `folder` is rewritten without them: they are quarantined,
    and its content hash is that of the rows left. What a killed call looked at is not looked at again.
    Raises UserError where none is left, UserError or Fault where some cannot be read now, Fault where a worker dies.
    """
    manifest = Manifest.load(folder)
    n = len(manifest)
    unfinished = folder / f"verify-{manifest.content}"

    def words_of(first: int, last: int) -> Iterator[tuple[Any, ...]]:
        return ((folder, manifest.content, row) for row in range(first, last))

    found = scan.look_at(n, words_of, _look, unfinished, track, f"decoding {manifest.source}", manifest.name)
    shutil.rmtree(unfinished)
    broken = [[manifest.name(row), reason] for row, reason in found.reason.items()]
    if len(broken) == n:
        raise UserError(f"{manifest.source}: none of its {n} images is sound; the first: {': '.join(broken[0])}")
    if broken:
        _without(manifest, found.sound, found.head[found.sound], broken).save(folder)
    return broken


@lru_cache(1)
def _opened(folder: Path, _content: str) -> tuple[Manifest, FileStorage]:
    """A worker's own manifest and storage, kept from row to row of one content."""
    manifest = Manifest.load(folder)
    return manifest, FileStorage(manifest)


def _look(folder: Path, content: str, row: int) -> tuple[int, int, int, int, int, bytes] | str:
    """Height, width, kind, orientation, coding and the sha256 of the first bytes of a sound image of the size indexed, or why it is not."""
    manifest, storage = _opened(folder, content)
    (buffer,) = storage.read(np.array([row]))
    indexed = (
        int(manifest.height[row]),
        int(manifest.width[row]),
        int(manifest.kind[row]),
        int(manifest.orientation[row]),
        int(manifest.coding[row]),
    )
    if isinstance(buffer, Unreadable):
        raise buffer
    try:
        if isinstance(buffer, BadImage):
            raise buffer
        if not beton.unchanged(manifest.path(row), int(manifest.offset[row]), buffer):
            raise BadImage("its bytes are not those that were packed (CRC-32)")
        if buffer.ndim == 3:  # pixels
            return *indexed, hashlib.sha256(buffer.reshape(-1)[:HEAD]).digest()
        width, height = decode_upright(buffer, indexed[3]).size
    except BadImage as error:
        return str(error)
    if (height, width) != indexed[:2]:
        return f"is {width}x{height}, indexed as {indexed[1]}x{indexed[0]}"
    damage = damage_of(buffer) if kind_of(buffer) == "JPEG" else ""
    return damage or (*indexed, hashlib.sha256(buffer[:HEAD]).digest())


def _without(
    manifest: Manifest, sound: NDArray[np.bool_], heads: NDArray[np.uint8], broken: list[list[str]]
) -> Manifest:
    columns = {name: getattr(manifest, name)[sound] for name in COLUMNS}
    content = content_hash(columns["height"], columns["width"], columns["label"], columns["length"], heads)
    return replace(manifest, **columns, content=content, quarantined=manifest.quarantined + broken)
