"""Small folders of photographs for the tests of turning, and answers to them."""

import ctypes.util
import hashlib
import os
from pathlib import Path

import pytest
from PIL import Image

from conftest import draw
from corpus import encode
from fastrot.orient.answers import Answer

NEEDS_TURBOJPEG = pytest.mark.skipif(
    ctypes.util.find_library("turbojpeg") is None,
    reason="libturbojpeg is not installed (apt-get install libturbojpeg0)",
)


def answer(file: str, clockwise: int, decided: bool = True, exif: int | None = None) -> Answer:
    """An answer; its probabilities do not matter."""
    return Answer(file, 0, None, clockwise, (1.0, 0.0, 0.0, 0.0), decided, exif)


def photograph(number: int, width: int = 48, height: int = 32) -> Image.Image:
    return draw(height, width, number)


def with_tag(orientation: int | None) -> dict:
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    return {"exif": exif} if orientation else {}


def make(folder: Path, files: dict[str, bytes]) -> Path:
    """Write files, each with a mode and a time of its own."""
    for number, (name, data) in enumerate(files.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.chmod(0o640 if number % 2 else 0o604)
        os.utime(path, ns=(10**18 + number, 10**18 + 10 * number))
    return folder


def state(folder: Path) -> dict[str, tuple[str, int, int]]:
    """Of every file below a folder: sha256, mode, modification time."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            stat = path.stat()
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(path.relative_to(folder))] = (digest, stat.st_mode & 0o777, stat.st_mtime_ns)
    return found


def jpeg(number: int, orientation: int | None = None, **options) -> bytes:
    return encode(photograph(number, **options), **with_tag(orientation))
