"""Drawn photographs of a usual size: nothing is downloaded."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from fastrot import machine
from fastrot.demo.objects import CLASSES
from fastrot.demo.scenes import draw
from fastrot.files import remove

SIZES = ((500, 375), (500, 333), (375, 500), (640, 480), (400, 400))  # ImageNet's commonest, about
_GRAIN = 9  # levels, so that a file has about the 110 kB of ImageNet's
_ALONE = 64  # so many are drawn sooner than processes start


def photograph(index: int) -> tuple[Image.Image, str]:
    """Image `index` and its class: the demo's scene, enlarged, with a camera's grain."""
    scene, name = draw(index, 0)
    rng = np.random.default_rng(index)
    pixels = np.asarray(scene.resize(SIZES[index % len(SIZES)], Image.Resampling.BICUBIC), np.float32)
    pixels = pixels + rng.normal(0, _GRAIN, (*pixels.shape[:2], 1)).astype(np.float32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), name


def _save(folder: Path, index: int) -> None:
    image, name = photograph(index)
    image.save(folder / name / f"{index:06d}.jpg", quality=90)


def drawn(work: Path, count: int) -> Path:
    """A folder of class folders of JPEGs, drawn where it is not there yet."""
    folder, scratch = work / f"images-{count}", work / ".images"
    if folder.is_dir():
        return folder
    remove(scratch)  # of a part that was stopped while it drew
    for name in CLASSES:
        (scratch / name).mkdir(parents=True)
    save = partial(_save, scratch)
    if count <= _ALONE:
        list(map(save, range(count)))
    else:  # spawn: a fork of a process that runs torch's threads may hang
        with ProcessPoolExecutor(machine.cores(), mp_context=multiprocessing.get_context("spawn")) as pool:
            list(pool.map(save, range(count), chunksize=16))
    return scratch.rename(folder)
