"""Detection and segmentation as a user runs them, on drawn images: resume, ranks, dry run, every refusal's one line."""

import json

import pytest
import torch
from PIL import Image, ImageDraw
from pycocotools import mask as rle
from safetensors.torch import load_file

from conftest import draw, metrics
from fastrot.data.sources.voc import CLASSES

SMALL = [
    "--random-init", "0", "model.arch=resnet18", "rotation.views=one", "engine.kind=plain", "optim.images_per_step=2",
    "optim.lr=0.01", "optim.warmup_steps=2", "optim.steps=4", "run.log_every=1", "run.checkpoint_every=2",
    "run.tensorboard=false", "run.evaluate_every_steps=2", "data.threads=2",
]  # fmt: skip
DETECT = ["detect", *SMALL, "detect.shorts=[64,80]", "detect.test_short=64", "detect.longest=120", "detect.regions=16"]
SEGMENT = ["segment", *SMALL, "segment.base=[96,64]", "segment.crop=64", "segment.classes=3"]
SIZES = ((60, 80), (64, 64), (90, 60), (60, 100), (72, 64))
TIMES = {
    "images_per_s", "views_per_s", "step_s", "wait_share", "copy_share", "rotate_share", "compute_share", "update_share",
    "memory_gib", "eta_s",
}  # fmt: skip


def boxes_of(number: int) -> list[tuple[int, int, int, int]]:
    """Inclusive corners of the rectangles drawn on an image."""
    return [(8, 10, 40, 44)] + ([(30, 20, 58, 50)] if number % 2 else [])


def picture(number: int) -> Image.Image:
    height, width = SIZES[number % len(SIZES)]
    image = draw(height, width, number)
    for at, box in enumerate(boxes_of(number)):
        ImageDraw.Draw(image).rectangle(box, fill=(220, 30, 30) if at == 0 else (30, 30, 220))
    return image


def xml_of(number: int) -> str:
    height, width = SIZES[number % len(SIZES)]
    objects = "".join(
        f"<object><name>{CLASSES[at]}</name><difficult>0</difficult><bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin>"
        f"<xmax>{x2 + 1}</xmax><ymax>{y2 + 1}</ymax></bndbox></object>"
        for at, (x1, y1, x2, y2) in enumerate(boxes_of(number))
    )
    return f"<annotation><size><width>{width}</width><height>{height}</height></size>{objects}</annotation>"


def write_voc(root, numbers, split="trainval"):
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main", "ImageSets/Segmentation", "SegmentationClass"):
        (root / folder).mkdir(parents=True)
    for number in numbers:
        name = f"{number:06}"
        picture(number).save(root / f"JPEGImages/{name}.jpg", quality=95)
        (root / f"Annotations/{name}.xml").write_text(xml_of(number))
        mask_of(number).save(root / f"SegmentationClass/{name}.png")
    for at, one in enumerate(CLASSES):
        lines = [f"{number:06} {1 if at < len(boxes_of(number)) else -1}" for number in numbers]
        (root / f"ImageSets/Main/{one}_{split}.txt").write_text("\n".join(lines))
    (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(f"{number:06}" for number in numbers))
    return root


def mask_of(number: int) -> Image.Image:
    mask = Image.new("P", picture(number).size)
    for at, box in enumerate(boxes_of(number)):
        ImageDraw.Draw(mask).rectangle(box, fill=at + 1)
    return mask


def write_coco(root, numbers):
    (root / "images").mkdir(parents=True)
    images, objects = [], []
    for number in numbers:
        one = picture(number)
        one.save(root / f"images/{number}.jpg", quality=95)
        images.append({"id": number, "file_name": f"{number}.jpg", "height": one.height, "width": one.width})
        for at, (x1, y1, x2, y2) in enumerate(boxes_of(number)):
            polygon = [x1, y1, x2, y1, x2, y2, x1, y2]
            area = float(rle.area(rle.merge(rle.frPyObjects([polygon], one.height, one.width))))
            objects.append({
                "id": len(objects) + 1, "image_id": number, "category_id": at + 5, "segmentation": [polygon],
                "bbox": [x1, y1, x2 - x1, y2 - y1], "area": area, "iscrowd": 0,
            })  # fmt: skip
    categories = [{"id": 5, "name": "red"}, {"id": 6, "name": "blue"}]
    content = {"images": images, "annotations": objects, "categories": categories}
    (root / "all.json").write_text(json.dumps(content))
    return f"coco:{root}/all.json?images={root}/images"


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    return write_voc(tmp_path_factory.mktemp("voc"), range(6))


@pytest.fixture(scope="module")
def words(voc, tmp_path_factory):
    """By kind: the command line of a tiny run, without its folder."""
    coco = write_coco(tmp_path_factory.mktemp("coco"), range(6))
    boxes = f"voc:{voc}?split=trainval"
    masks = f"pairs:{voc}/JPEGImages,{voc}/SegmentationClass"
    return {
        "c4": [*DETECT, f"data.train={boxes}", f"data.val={boxes}"],
        "fpn": [*DETECT, "detect.model=fpn", "detect.figures=coco", f"data.train={coco}", f"data.val={coco}"],
        "segment": [*SEGMENT, f"data.train={masks}", f"data.val={masks}"],
    }


JUDGED = {"c4": "held_out_ap50", "fpn": "held_out_ap", "segment": "held_out_mean_iou"}


def learnt(out):
    """What was logged, but for speeds."""
    return [{key: value for key, value in line.items() if key not in TIMES} for line in metrics(out)]


@pytest.mark.parametrize("kind", JUDGED)
def test_stopped_and_resumed_is_the_run_that_was_not(kind, words, tmp_path, fastrot):
    whole = fastrot(*words[kind], f"run.out={tmp_path / 'whole'}", "--json")
    assert whole.code == 0, whole.err
    assert 0 <= whole.json[JUDGED[kind]] <= 1 and whole.json["steps"] == 4
    assert [line["step"] for line in metrics(tmp_path / "whole") if JUDGED[kind] in line] == [1, 3]
    assert [line["lr"] for line in metrics(tmp_path / "whole") if "lr" in line] == pytest.approx(
        [1e-3, 5.5e-3, 1e-2, 1e-2]
    )
    assert json.loads((tmp_path / "whole/STATUS.json").read_text())["state"] == "done"
    for steps in (2, 4):
        done = fastrot(*words[kind], f"run.out={tmp_path / 'parts'}", f"run.max_steps={steps}")
        assert done.code == 0, done.err
    assert "resumed from step-00000002" in done.err
    ours, theirs = learnt(tmp_path / "parts"), learnt(tmp_path / "whole")
    assert json.dumps(ours) == json.dumps(theirs)
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(tmp_path / run / "checkpoints/step-00000004" / name) for run in ("parts", "whole"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
