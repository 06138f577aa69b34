"""Decoding every image of a manifest in full, and quarantining what is damaged."""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from fastrot.data import beton
from fastrot.data.faults import decode_upright, kind_of
from fastrot.data.manifest import COLUMNS, HEAD, Manifest, content_hash
from fastrot.data.storage import FileStorage
from fastrot.errors import BadImage, UserError

_BLOCK = 1024  # images between two signs of progress
# libjpeg's warnings of damaged data (jerror.h); others speak of odd headers, or of an ICC profile
_DAMAGE = ("Corrupt JPEG data", "Premature end of JPEG file")
_HARMLESS = "bad ICC marker"


def damage_of(jpeg: NDArray[np.uint8] | bytes) -> str:
    """libjpeg's first warning of damaged data in a JPEG, which Pillow and torchvision keep to themselves; "" = none.

    Some damage cannot be seen: bits that decode as other coefficients and leave the decoder in step, and a
    progressive file cut between two scans.
    A form that libjpeg-turbo's simple interface refuses, but Pillow decodes, is Pillow's to judge.
    """
    try:
        space = simplejpeg.decode_jpeg_header(jpeg)[2]
        # luma alone: all entropy-coded data are read, half the arithmetic is saved
        simplejpeg.decode_jpeg(jpeg, "CMYK" if space in ("CMYK", "YCCK") else "GRAY", strict=True)
    except ValueError as error:
        said = str(error)
        return said if said.startswith(_DAMAGE) and _HARMLESS not in said else ""
    return ""


def verify(folder: Path, threads: int, track: Callable) -> list[list[str]]:
    """[place, reason] of every row that cannot be read, decoded in full, and found free of damage.

    Where there are such rows the manifest in `folder` is rewritten without them: they are quarantined,
    and its content hash is that of the rows left. Raises UserError where none is left.
    """
    manifest = Manifest.load(folder)
    n = len(manifest)
    broken: list[list[str]] = []
    sound, heads = np.ones(n, bool), np.zeros((n, 32), np.uint8)
    storage = FileStorage(manifest)
    blocks = [range(at, min(at + _BLOCK, n)) for at in range(0, n, _BLOCK)]
    with ThreadPoolExecutor(threads) as pool:
        for rows in track(blocks, len(blocks), f"decoding {manifest.source}, {n:,} images in blocks of {_BLOCK:,}"):
            for row, found in zip(rows, pool.map(lambda row: _look(manifest, storage, row), rows), strict=True):
                if isinstance(found, str):
                    broken.append([manifest.name(row), found])
                    sound[row] = False
                else:
                    heads[row] = np.frombuffer(found, np.uint8)
    storage.close()
    if len(broken) == n:
        raise UserError(f"{manifest.source}: none of its {n} images is sound; the first: {': '.join(broken[0])}")
    if broken:
        _without(manifest, sound, heads[sound], broken).save(folder)
    return broken


def _look(manifest: Manifest, storage: FileStorage, row: int) -> bytes | str:
    """sha256 of the first bytes of a row's image where it is sound and of the size indexed, or why it is not."""
    (buffer,) = storage.read(np.array([row]))
    try:
        if isinstance(buffer, BadImage):
            raise buffer
        if not beton.unchanged(manifest.path(row), int(manifest.offset[row]), buffer):
            raise BadImage("its bytes are not those that were packed (CRC-32)")
        if buffer.ndim == 3:  # pixels
            return hashlib.sha256(buffer.reshape(-1)[:HEAD]).digest()
        width, height = decode_upright(buffer).size
    except BadImage as error:
        return str(error)
    if (width, height) != (manifest.width[row], manifest.height[row]):
        return f"is {width}x{height}, indexed as {manifest.width[row]}x{manifest.height[row]}"
    damage = damage_of(buffer) if kind_of(buffer) == "JPEG" else ""
    return damage or hashlib.sha256(buffer[:HEAD]).digest()


def _without(manifest: Manifest, sound: NDArray[np.bool_], heads: NDArray[np.uint8], broken: list) -> Manifest:
    columns = {name: getattr(manifest, name)[sound] for name in COLUMNS}
    content = content_hash(*(columns[name] for name in ("height", "width", "label", "length")), heads)
    return replace(manifest, **columns, content=content, quarantined=manifest.quarantined + broken)
