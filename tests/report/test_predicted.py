"""Detection and segmentation on the page: figures beside the published ones, predictions beside the truth."""

import base64
import io
import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle
from safetensors.torch import save_file
from scipy import stats

from conftest import draw
from fastrot import distributed
from fastrot.data.whole_masks import ShownMask
from fastrot.models.resnet import backbone_state, build_model
from fastrot.models.segmenter import Segmenter
from fastrot.report import drawn, markdown, predicted, published, whole_tables
from fastrot.report.tables import Data
from fastrot.tasks.detect import Found
from trained import backbone, write_run


def voc(shift):
    """A detector's result, as its run prints it."""
    each = {f"held_out_ap50_{number}": 0.5 + shift + number / 100 for number in range(20)}
    means = {"ap50": 0.595 + shift, "ap50_area": 0.6, "d2_ap": 0.3 + shift, "d2_ap50": 0.58, "d2_ap75": 0.2}
    return {f"held_out_{name}": value for name, value in means.items()} | each | {"choice": {}}


def test_vocs_ap_stands_beside_the_published_one_with_an_interval_over_classes():
    data = Data(20, 16_551, 4952, 800, None)
    theirs, why = data.beside("detect_voc0712", published.DETECT)
    table = whole_tables.detected("x", theirs, (voc(0.2), voc(0)), data, ["a note"])
    first, area, d2 = table.rows[:3]
    assert why is None and table.best is first and table.published == published.SOURCE and table.notes[-1] == "a note"
    assert (first.label, first.published, first.pretrained.n) == ("AP50", 79.67, 20)
    assert first.pretrained.value == pytest.approx(79.5) and first.difference == pytest.approx(20)
    assert first.pretrained.low < 79.5 < first.pretrained.high and first.verdict == "better"
    each = [[100 * voc(shift)[f"held_out_ap50_{number}"] for number in range(20)] for shift in (0.2, 0)]
    assert first.p == pytest.approx(stats.wilcoxon(*each).pvalue)
    assert (area.published, d2.pretrained.low, d2.p, d2.verdict) == (None, None, None, "same")
    assert d2.difference == pytest.approx(20)
    row = next(line for line in markdown._table(table) if line.startswith("| AP, detectron2's"))
    assert row == f"| AP, detectron2's | {markdown.NOTHING} | 50.00 | 30.00 | +20.00 |"


def test_cocos_figures_of_boxes_and_masks_stand_beside_the_published_ones():
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    result = {f"held_out_{prefix}{name}": 0.25 for prefix in ("", "mask_") for name in names} | {"choice": {}}
    result |= {f"held_out_{prefix}ap_{number}": 0.25 for prefix in ("", "mask_") for number in range(80)}
    random = result | {"held_out_ap_small": math.nan, "held_out_mask_ap_3": 0.05}
    data = Data(80, 118_287, 5000, 800, None)
    theirs, _ = data.beside("detect_coco", published.DETECT)
    table = whole_tables.detected("x", theirs, (result, random), data, [])
    rows = {row.label: row for row in table.rows}
    assert {label: row.published for label, row in rows.items() if row.published} == published.DETECT["detect_coco"]
    assert len(rows) == 12 and table.best.label == "box AP" and rows["box AP"].pretrained.n == 80
    assert rows["box AP small"].random is None and rows["box AP small"].difference is None
    assert rows["mask AP"].random.value == pytest.approx(24.75) and rows["box AP75"].random.value == 25
    boxes = whole_tables.detected("x", {}, ({k: v for k, v in result.items() if "mask" not in k},) * 2, data, [])
    assert [row.label.split()[0] for row in boxes.rows] == ["box"] * 6 and boxes.published is None


def test_mean_iou_is_of_the_classes_that_are_there():
    result = {
        "held_out_mean_iou": 0.4,
        "held_out_mean_accuracy": 0.5,
        "held_out_all_accuracy": 0.9,
        "choice": {"optim.lr": 1},
    }
    result |= {"held_out_iou_0": 0.2, "held_out_iou_1": math.nan, "held_out_iou_2": 0.6}
    data = Data(21, 10_582, 1449, 512, None)
    theirs, why = data.beside("segment_voc12aug", published.SEGMENT)
    table = whole_tables.segmented("x", theirs, (result, result), data, [])
    first = table.rows[0]
    assert (why, first.label, first.published, first.pretrained.n, first.p) == (None, "mean IoU", 64.31, 2, 1.0)
    assert first.pretrained.value == pytest.approx(40) and "Best of a grid" in table.notes[1]
    assert [row.pretrained.value for row in table.rows[1:]] == pytest.approx([50, 90])
    other = Data(21, 1464, 1449, 512, None).beside("segment_voc12aug", published.SEGMENT)[1]
    assert other == "another task: Pascal VOC12 with SBD's masks has 10,582 images to learn from (here 1,464)"


def opened(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))), float)


def shown(height, width, gray=0):
    image = torch.full((3, height, width), gray, dtype=torch.uint8)
    return ShownMask(image, torch.zeros(0, 0, dtype=torch.uint8), (2 * height, 2 * width))  # seen at half its size


def test_boxes_and_masks_are_drawn_where_they_are():
    cells = np.zeros((240, 480), np.uint8, order="F")
    cells[100:200, 60:120] = 1
    found = Found(
        0, np.array([[50, 90, 150, 220]], np.float32), np.ones(1, np.float32), np.zeros(1, int), [rle.encode(cells)]
    )
    picture = opened(drawn.drawn(shown(120, 240), found, ["a"]))
    assert picture.shape == (240, 480, 3)
    red = picture[..., 0] - picture[..., 2]
    assert red[150, 50] > 60 and red[220, 100] > 60 and red[150, 150] > 60, "the border, in the first class's red"
    assert 60 < red[150, 90] < 120 and red[150, 130] < 20, "half covered by the mask"
    assert abs(red[210, 140]) < 20 and picture[50:80].max() < 20 and picture[:, 200:].max() < 20
    twice = Found(0, found.box.repeat(2, 0), found.score.repeat(2), found.label.repeat(2), found.masks * 2)
    again = opened(drawn.drawn(shown(120, 240), twice, ["a"]))
    assert (again[..., 0] - again[..., 2])[150, 90] > red[150, 90] + 10, "masks that overlap cover more"
    none = Found(0, np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, int), [])
    assert opened(drawn.drawn(shown(120, 240), none, ["a"])).max() == 0


def test_classes_of_pixels_are_drawn_in_vocs_colours():
    mask = np.zeros((240, 480), np.uint8)
    mask[:, 240:] = 2
    picture = opened(drawn.drawn(shown(120, 240, 100), mask, ["a", "b", "c"]))
    assert np.abs(picture[:, :230] - 50).max() < 6
    assert np.abs(picture[:, 250:] - [50, 50 + 64, 50]).max() < 6


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    for folder in ("images", "masks"):
        (root / folder).mkdir()
    for number in range(8):
        draw(60, 80, number).save(root / "images" / f"{number}.jpg", quality=95)
        mask = np.zeros((60, 80), np.uint8)
        mask[:, 40:] = 4
        Image.fromarray(mask).save(root / "masks" / f"{number}.png")
    return f"pairs:{root}/images,{root}/masks"


def test_predictions_of_both_networks_stand_beside_the_truth(pairs, tmp_path):
    torch.manual_seed(0)
    runs, network = {}, Segmenter(backbone(), 5, False)
    torch.nn.init.zeros_(network.head.classifier.weight)
    for name, label in (("pretrained", 1), ("random", 2)):
        network.head.classifier.bias.data[:] = 9 * torch.eye(5)[label]  # one class everywhere
        runs[name] = write_run(tmp_path / name, network, {"segment.masks": "c0ffee"})
    ranks = distributed.start()
    try:
        made = predicted.beside_truth("x", pairs, runs, ranks)
    finally:
        distributed.end()
    assert made.columns == ["truth", "pretrained", "random"] and [len(row) for row in made.rows] == [3] * 6
    assert [name for name, _ in made.colours] == ["class 0", "class 1", "class 2", "class 4"]
    assert dict(made.colours)["class 1"] == "#800000"
    assert [row[0].name for row in made.rows] == [f"{number}.jpg" for number in (0, 1, 3, 4, 6, 7)]
    truth, first, second = (opened(one.uri) for one in made.rows[0])
    image = opened(drawn.drawn(shown(30, 40), np.zeros((60, 80), np.uint8), []))
    assert truth.shape == first.shape == image.shape == (240, 320, 3)
    assert np.abs((first - second)[100, 100] - [64, -64, 0]).max() < 8, "red, which is class 1, and green, class 2"
    assert np.abs((truth - second)[100, 100] - [0, -64, 0]).max() < 8, "class 0 on the left"
    assert np.abs((truth - second)[100, 300] - [0, -64, 64]).max() < 8, "blue, class 4, on the right"


SUITE = """
runs:
  - name: boxes
    title: Boxes
    task: detect
    config: configs/detect_voc0712_c4_24k.yaml
    train: {coco}
    test: {coco}
    overrides: [{quick}, "detect.shorts=[48]", detect.test_short=48, detect.longest=64, detect.regions=8, detect.figures=coco]
    published: detect_coco
  - name: pixels
    title: Pixels
    task: segment
    config: configs/segment_voc12aug_fcn_20k.yaml
    train: {pairs}
    test: {pairs}
    overrides: [{quick}, "segment.base=[64,48]", segment.crop=48, segment.classes=5]
  - name: cityscapes
    title: Cityscapes
    task: segment
    config: configs/segment_cityscapes_fcn_40k.yaml
    train: cityscapes:nowhere?split=train
    test: cityscapes:nowhere?split=val
"""
QUICK = "optim.images_per_step=2, run.max_steps=1, run.tensorboard=false, data.threads=1"


@pytest.mark.slow
def test_a_page_trains_both_and_shows_what_they_see(pairs, tmp_path, fastrot):
    images = pairs.removeprefix("pairs:").partition(",")[0]
    entry = {"height": 60, "width": 80}
    content = {
        "images": [entry | {"id": number, "file_name": f"{number}.jpg"} for number in range(8)],
        "annotations": [
            {
                "id": number + 1,
                "image_id": number,
                "category_id": 3,
                "bbox": [40, 0, 40, 60],
                "area": 2400,
                "iscrowd": 0,
            }
            for number in range(8)
        ],
        "categories": [{"id": 3, "name": "right half"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    coco = f"coco:{tmp_path}/a.json?images={images}"
    (tmp_path / "suite.yaml").write_text(SUITE.format(coco=coco, pairs=pairs, quick=QUICK))
    save_file(backbone_state(build_model("resnet18", 4, 5)), tmp_path / "backbone.safetensors")
    words = [
        "--checkpoint",
        tmp_path / "backbone.safetensors",
        "--suite",
        tmp_path / "suite.yaml",
        "--out",
        tmp_path / "out",
    ]
    assert fastrot("page", *words).code == 0
    page, html = json.loads((tmp_path / "out/page.json").read_text()), (tmp_path / "out/page.html").read_text()
    tables = {table["title"]: table for table in page["tables"]}
    assert list(tables) == ["Detection, Boxes", "Segmentation, Pixels"]
    for name, title, figure in (("boxes", "Detection, Boxes", "ap"), ("pixels", "Segmentation, Pixels", "mean_iou")):
        for start in ("pretrained", "random"):
            (file,) = (tmp_path / "out/results" / start).glob(f"{name}-*.json")
            value = 100 * json.loads(file.read_text())[f"held_out_{figure}"]
            assert tables[title]["rows"][0][start]["value"] == pytest.approx(value)
    apart = {one["title"]: one for one in page["published_apart"]}
    assert (
        "80 classes (here 1)" in apart["Detection, Boxes"]["why"]
        and apart["Detection, Boxes"]["rows"]["box AP"] == 37.9
    )
    assert apart["Segmentation, Cityscapes"]["rows"] == {}
    assert html.count('<div class="seen">') == 12 and len(re.findall(r"<figcaption>truth: \d.jpg", html)) == 12
    again = fastrot("page", *words)
    assert again.code == 0 and "step 1/" not in again.err, "what is done is not done again"
