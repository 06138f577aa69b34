"""What the benches of detection and segmentation share: small sets cut out of real ones, and fastrot run on them."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import harness
import numpy as np
from PIL import Image

from fastrot.cli import main as fastrot

CAMVID = 11  # classes; what lies above them in its masks is no class
_SMALLEST = 28  # side in pixels of the smallest object of a COCO image that is taken: anchors begin at 32


def spread(things: list, count: int) -> list:
    """So many of them, evenly spaced."""
    return [things[at * len(things) // count] for at in range(count)]


def voc_subset(root: Path, out: Path, count: int) -> str:
    """`count` images of voc07's trainval that have an object which is not difficult, as a source."""
    (out / "ImageSets/Main").mkdir(parents=True)
    flags = [one.read_text().split() for one in sorted((root / "ImageSets/Main").glob("*_trainval.txt"))]
    good = sorted({name for words in flags for name, flag in zip(words[::2], words[1::2], strict=True) if flag == "1"})
    chosen = spread(good, count)
    for folder, ending in (("JPEGImages", "jpg"), ("Annotations", "xml")):
        (out / folder).mkdir()
        for name in chosen:
            shutil.copy(root / folder / f"{name}.{ending}", out / folder)
    for file in (root / "ImageSets/Main").glob("*_trainval.txt"):
        lines = [line for line in file.read_text().splitlines() if line.split()[0] in chosen]
        (out / "ImageSets/Main" / file.name).write_text("\n".join(lines))
    return f"voc:{out}?split=trainval"


def coco_subset(root: Path, out: Path, count: int) -> str:
    """`count` images of coco_sample's train2017 without crowds and without an object under 28 pixels, as a source."""
    out.mkdir(parents=True)
    content = json.loads((root / "annotations/instances_train2017.json").read_text())
    poor = {
        one["image_id"] for one in content["annotations"] if one["iscrowd"] or min(one["bbox"][2:]) < _SMALLEST
    }  # fmt: skip
    some = {one["image_id"] for one in content["annotations"]} - poor
    images = spread([one for one in content["images"] if one["id"] in some], count)
    ids = {one["id"] for one in images}
    content |= {
        "images": images,
        "annotations": [one for one in content["annotations"] if one["image_id"] in ids],
    }
    (out / "some.json").write_text(json.dumps(content))
    return f"coco:{out}/some.json?images={root}/train2017"


def camvid(root: Path, out: Path, split: str, count: int | None = None, window: tuple[int, int] = (480, 360)) -> str:
    """camvid_sample's images of a split, all or some, or a window (width, height) of their middles, beside masks in which
    Unlabelled is no class, as a source."""
    files = sorted((root / split).glob("*.jpg"))
    for name in ("images", "masks"):
        (out / name).mkdir(parents=True)
    for file in spread(files, count or len(files)):
        with Image.open(file) as image, Image.open(root / f"{split}annot" / f"{file.stem}.png") as mask:
            left, top = ((whole - part) // 2 for whole, part in zip(image.size, window, strict=True))
            box = (left, top, left + window[0], top + window[1])
            image.crop(box).save(out / f"images/{file.stem}.png")
            classes = np.asarray(mask.crop(box))
        Image.fromarray(np.where(classes < CAMVID, classes, 255).astype(np.uint8)).save(out / f"masks/{file.stem}.png")
    return f"pairs:{out}/images,{out}/masks"


def run(words: list[str]) -> dict:
    """A command of fastrot's in this process, as a user calls it: what --json prints. Ends the bench where it fails."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = fastrot([*words, "--json"])
    harness.gate(code in (0, None), f"fastrot {' '.join(words)}")
    return json.loads(said.getvalue().splitlines()[-1])


def lines(out: Path) -> list[dict]:
    """What a run logged."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
