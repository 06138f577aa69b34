"""Draw the data set of `make demo`: small upright scenes, one folder a class.

Nothing is downloaded: every image is drawn with Pillow from its seed and its index. The
scenes are made so that "up" has to be learnt from many cues (roofs, shadows, grass blades,
clouds with a flat base, shading) and never from one: skies may be dark, red or green, grounds
bright, cameras tilted, colours missing.

    fastrot demo-data --out data/scenes --train 4000 --val 400 --seed 0
"""

import json
import math
import multiprocessing
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from rich.console import Console
from rich.progress import track

from fastrot.demo.objects import CLASSES, OBJECTS, PROPS, Drawing, house, stone, tree
from fastrot.demo.scenery import AT_HOME, INDOORS, MARGIN, PALETTES, SCALE, Brush, Scene, floor, heavens, hills, wall
from fastrot.errors import UserError

VERSION = 1  # raise it when the drawing changes: an older folder is then no longer accepted


def develop(image: Image.Image, rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """The camera: tilt, crop, blur, uneven light, grain, contrast, colour cast, at times no colour."""
    tilted = image.rotate(max(-10.0, min(10.0, rng.normal(0, 4))), Image.Resampling.BILINEAR)
    left, top = ((a - b * SCALE) // 2 for a, b in zip(tilted.size, size, strict=True))
    small = tilted.crop((left, top, left + size[0] * SCALE, top + size[1] * SCALE)).reduce(SCALE)
    small = small.filter(ImageFilter.GaussianBlur(float(rng.choice((0.0, 0.3, 0.5, 0.9)))))
    pixels: NDArray[np.floating] = np.asarray(small, np.float32)
    patches = Image.fromarray(rng.normal(0, 1, (9, 9)).astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
    grain = rng.normal(0, rng.uniform(1, 6), (*pixels.shape[:2], 1))
    pixels = pixels * (1 + rng.uniform(0.02, 0.09) * np.asarray(patches)[..., None]) + grain
    # A ramp of light in any direction: "brighter is up" must not be enough.
    angle, depth = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.3)
    y, x = np.mgrid[-0.5 : 0.5 : size[1] * 1j, -0.5 : 0.5 : size[0] * 1j]
    pixels *= 1 + depth * (x * math.cos(angle) + y * math.sin(angle))[..., None]
    if rng.random() < 0.08:
        pixels[:] = pixels.mean(2, keepdims=True)
    pixels = 128 + (pixels - 128) * rng.uniform(0.75, 1.15) + rng.normal(0, 10)
    pixels *= rng.normal(1, 0.09, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def draw(index: int, seed: int) -> tuple[Image.Image, str]:
    """Scene `index` of data set `seed` and the name of its class. Nothing else decides it."""
    rng = np.random.Generator(np.random.PCG64([seed, index]))
    name = CLASSES[index % len(CLASSES)]
    width, height = rng.integers(96, 241, 2).tolist()
    canvas = int(width * SCALE * MARGIN), int(height * SCALE * MARGIN)
    kinds = [
        k
        for k, v in PALETTES.items()
        if (v.floor == "water") == (name == "boat") and (k not in INDOORS or name in AT_HOME)
    ]
    kinds += [k for k in INDOORS if name in AT_HOME] * 2
    kind = kinds[rng.integers(len(kinds))]
    floor_kind, light = PALETTES[kind].floor, np.array(PALETTES[kind].light)
    colours = np.clip(np.array(PALETTES[kind][:4]) + rng.normal(0, 22, 3) + rng.normal(0, 9, (4, 3)), 0, 255)
    if rng.random() < 0.04:  # another planet: the same scene, its colours exchanged
        colours, light = colours[:, rng.permutation(3)], rng.permutation(light)
    if rng.random() < 0.03:  # a ramp the other way round is rare outdoors, not impossible
        colours[:2] = colours[1::-1]
    close = rng.random() < 0.12
    horizon = canvas[1] * (rng.uniform(0.15, 0.85) if close else rng.uniform(0.35, 0.72))
    scene = Scene(
        Image.new("RGB", canvas),
        rng,
        horizon,
        colours[:2],
        colours[2:],
        light,
        int(rng.choice((-1, 1))),
    )
    if kind in INDOORS:
        wall(scene)
    else:
        heavens(scene, kind == "night")
        hills(scene)
    floor(scene, floor_kind)
    depth = (canvas[1] / MARGIN + canvas[1]) / 2 - horizon
    things: list[tuple[float, float, float, Drawing]] = []
    for _ in range(rng.integers(1, 8) if floor_kind != "water" else rng.integers(0, 3)):
        k = rng.uniform(0.05, 1.1)
        prop = PROPS[int(rng.integers(len(PROPS)))] if floor_kind != "water" else stone
        things.append((horizon + depth * k, rng.uniform(0, 1), canvas[1] * (0.03 + 0.09 * k), prop))
    if kind not in INDOORS and rng.random() < 0.6:  # something small far away
        far = OBJECTS[name] if floor_kind == "water" else (house, tree, tree)[rng.integers(3)]
        things.append((horizon + depth * 0.06, rng.uniform(0.1, 0.9), canvas[1] * rng.uniform(0.06, 0.16), far))
    tallest = min(canvas) * (rng.uniform(0.7, 1.5) if close else rng.uniform(0.38, 0.7))
    foot = horizon + depth * rng.uniform(0.15, 0.75)
    if close:  # cut by the frame, yet never out of it
        foot = min(foot + tallest * rng.uniform(0, 0.4), canvas[1] / 2 + tallest * 0.6)
    things.append((foot, rng.uniform(0.3, 0.7), tallest, OBJECTS[name]))
    for y, x, tall, thing in sorted(things, key=lambda t: t[0]):
        thing(Brush(scene, x * canvas[0], y, tall))
    return develop(scene.image, rng, (width, height)), name


def save(folder: Path, seed: int, job: tuple[str, int]) -> None:
    """Draw one image and write it as JPEG, at a quality that depends on the image too."""
    split, index = job
    image, name = draw(index, seed)
    quality = int(np.random.default_rng([seed, index, 1]).integers(55, 96))
    image.save(folder / split / name / f"{index:06d}.jpg", quality=quality)


def write(root: str | Path, train: int, val: int, seed: int) -> None:
    """Write root/{train,val}/<class>/<index>.jpg as a whole or not at all; a complete root stays as it is."""
    root, parameters = Path(root), {"version": VERSION, "train": train, "val": val, "seed": seed}
    if min(train, val) < len(CLASSES):
        raise UserError(f"train and val must be at least {len(CLASSES)}, one image a class, got {train} and {val}")
    if seed < 0:
        raise UserError(f"seed must not be negative, got {seed}")
    if root.exists() and not root.is_dir():
        raise UserError(f"{root} is a file, not a folder")
    record = root / "scenes.json"
    if record.is_file():
        try:
            found = json.loads(record.read_text())
        except (RecursionError, ValueError):
            found = "something unreadable"
        if found == parameters:
            return
        raise UserError(f"{root} holds other scenes ({found}); delete it or choose another folder")
    if root.is_dir() and any(root.iterdir()):
        raise UserError(f"{root} is not empty and holds no scenes.json; choose another folder")
    started, console = time.perf_counter(), Console()
    jobs = [("train", i) for i in range(train)] + [("val", i) for i in range(train, train + val)]
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    partial_root = root.with_name(f".{root.name}.{os.getpid()}.partial")
    try:
        for split in ("train", "val"):
            for name in CLASSES:
                (partial_root / split / name).mkdir(parents=True)
        # spawn: a fork of a process that runs torch's threads may hang
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            done = pool.map(partial(save, partial_root, seed), jobs, chunksize=16)
            for _ in track(done, "drawing scenes", len(jobs), console=console, disable=not console.is_terminal):
                pass
        (partial_root / "scenes.json").write_text(json.dumps(parameters) + "\n")
        partial_root.replace(root)
    except OSError as error:
        raise UserError(f"cannot write {root}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial_root, ignore_errors=True)
    seconds = time.perf_counter() - started
    console.print(
        f"{root}: {train} + {val} scenes of {len(CLASSES)} classes drawn in {seconds:.1f} s",
        soft_wrap=True,
        highlight=False,
    )
