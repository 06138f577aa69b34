"""`fastrot predict` against the model called by hand, on files that pycocotools and Pillow read."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from pycocotools.coco import COCO
from torch import nn
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import box_convert
from torchvision.transforms.v2 import functional as V

from conftest import draw
from fastrot import distributed
from fastrot.config import load, to_yaml
from fastrot.errors import UserError
from fastrot.models.detector import faster_rcnn_c4, mask_rcnn_fpn
from fastrot.models.segmenter import Segmenter
from fastrot.report.contact_sheet import ContactSheet
from fastrot.runs.predict import predict
from trained import WORDS, backbone, write_run

CLASSES = [[7, "red"], [9, "blue"]]


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    found = {"fpn": mask_rcnn_fpn(backbone(), 2), "segment": Segmenter(backbone(), 5, False)}
    for network in found.values():
        network.eval()
    last = found["segment"].head.classifier
    with torch.no_grad():  # else one class is everywhere
        (logits,) = found["segment"](V.pil_to_tensor(draw(60, 90, 1))[None] / 255)
        last.bias -= logits.mean((0, 2, 3))
    return found


@pytest.fixture(scope="module")
def runs(networks, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return {
        "fpn": write_run(root / "fpn", networks["fpn"], {"detect.classes": CLASSES}, ["detect.model=fpn"], (1, 2)),
        "segment": write_run(root / "segment", networks["segment"], {"segment.masks": "c0ffee"}),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images at two depths, one of them lying on its side; one that is none."""
    root = tmp_path_factory.mktemp("any folder")
    (root / "deep" / "er").mkdir(parents=True)
    draw(60, 90, 1).save(root / "top.jpg", quality=95)
    exif = Image.Exif()
    exif[0x0112] = 6
    draw(50, 80, 2).save(root / "deep" / "er" / "lying.jpg", quality=95, exif=exif)
    (root / "deep" / "no image.png").write_text("nothing")
    return root


def as_shown(path):
    """(normalised [3, h, w], height and width of the upright image) at a short side of 32, at most 48 the other."""
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    size = (image.height, image.width)
    scale = min(32 / min(size), 48 / max(size))
    x = V.resize(V.pil_to_tensor(image), [int(side * scale + 0.5) for side in size], antialias=True) / 255
    return V.normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), size


def listed(out):
    return [json.loads(line) for line in (out / "bad_images.jsonl").read_text().splitlines()]


def test_a_detectors_predictions_are_the_models_and_pycocotools_reads_them(fastrot, runs, networks, folder, tmp_path):
    out = tmp_path / "out"
    done = fastrot("predict", runs["fpn"], folder / "deep", "--out", out, "--min-score", "0.3", "--json").json
    assert done["checkpoint"].endswith("step-00000001"), "the best on the held-out images, not the newest"
    assert done["images"] == done["bad_images"] == 1
    coco = COCO(out / "predictions.json")
    (image,) = coco.imgs.values()
    assert image["file_name"] == "er/lying.jpg" and [coco.cats[n]["name"] for n in (7, 9)] == ["red", "blue"]
    x, size = as_shown(folder / "deep" / "er" / "lying.jpg")
    with torch.no_grad():
        (want,) = networks["fpn"]([x])
    keep = want["scores"] >= 0.3
    boxes = want["boxes"][keep] * torch.tensor([size[1] / x.shape[2], size[0] / x.shape[1]]).repeat(2)
    got = coco.loadAnns(coco.getAnnIds(image["id"]))
    assert len(got) == len(boxes) > 0 and (image["height"], image["width"]) == size == (80, 50)
    found = torch.tensor([one["bbox"] for one in got])
    torch.testing.assert_close(box_convert(found, "xywh", "xyxy"), boxes, atol=0.01, rtol=0)
    np.testing.assert_allclose([one["score"] for one in got], want["scores"][keep].numpy(), atol=1e-5)
    assert [one["category_id"] for one in got] == [CLASSES[label - 1][0] for label in want["labels"][keep]]
    ours = np.stack([coco.annToMask(one) for one in got]).astype(bool)
    assert ours.shape[1:] == size and [one["area"] for one in got] == ours.sum((1, 2)).tolist()
    theirs = (paste_masks_in_image(want["masks"][keep], boxes, size)[:, 0] >= 0.5).numpy()
    overlap = (ours & theirs).sum((1, 2)) / (ours | theirs).sum((1, 2))
    large = theirs.sum((1, 2)) > 1000  # torchvision pastes at whole pixels: of a few it makes others
    assert large.sum() > 1 and (overlap[large] > 0.85).all()
    assert [(one["path"].endswith("deep/no image.png"), one["row"]) for one in listed(out)] == [(True, -1)]
    sheet = (out / "index.html").read_text()
    assert sheet.count("<img") == 1 and "er/lying.jpg</figcaption>" in sheet and "1 of 1 images" in sheet


def test_a_segmenters_masks_are_the_models_and_lie_on_their_images(fastrot, runs, networks, folder, tmp_path):
    out = tmp_path / "out"
    assert fastrot("predict", runs["segment"] / "checkpoints/step-00000002", folder, "--out", out).code == 0
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*.png")) == [
        "masks/deep/er/lying.png", "masks/top.png",
    ]  # fmt: skip
    for name in ("deep/er/lying", "top"):
        x, size = as_shown(folder / f"{name}.jpg")
        with torch.no_grad():
            (logits,) = networks["segment"](x[None])
        want = F.interpolate(logits, size, mode="bilinear").argmax(1)[0].numpy()
        mask = Image.open(out / "masks" / f"{name}.png")
        assert (
            mask.mode == "P" and mask.getpalette()[3:6] == [128, 0, 0] and mask.getpalette()[45:48] == [192, 128, 128]
        )
        assert len(np.unique(want)) > 1 and (np.asarray(mask) == want).mean() > 0.999
    sheet = (out / "index.html").read_text()
    assert sheet.count("<img") == 2 and "class 1</span>" in sheet


def test_an_image_that_breaks_while_read_is_listed_and_its_neighbour_is_predicted_once(fastrot, runs, tmp_path):
    for number in range(3):
        draw(60, 90, number).save(tmp_path / f"{number}.jpg")
    whole = (tmp_path / "1.jpg").read_bytes()
    (tmp_path / "1.jpg").write_bytes(whole.replace(b"\xff\xdb", b"\xff\xfe"))  # no tables: header and end are sound
    out = tmp_path / "out"
    done = fastrot("predict", runs["segment"], tmp_path, "--out", out, "--json").json
    assert done["images"] == 2 and done["bad_images"] == 1
    assert sorted(path.name for path in out.rglob("*.png")) == ["0.png", "2.png"]
    assert [one["path"] for one in listed(out)] == [str(tmp_path / "1.jpg")]


def test_the_c4_detector_has_boxes_alone_and_a_coco_sources_ids_are_kept(tmp_path, fastrot):
    torch.manual_seed(0)
    run = write_run(tmp_path / "c4", faster_rcnn_c4(backbone(), 2), {"detect.classes": CLASSES})
    draw(60, 90, 1).save(tmp_path / "a.jpg")
    entry = {"id": 391895, "file_name": "a.jpg", "height": 60, "width": 90}
    (tmp_path / "a.json").write_text(json.dumps({"images": [entry], "annotations": [], "categories": []}))
    source, out = f"coco:{tmp_path}/a.json?images={tmp_path}", tmp_path / "out"
    done = fastrot("predict", run, source, "--out", out, "--min-score", "0.05", "--json").json
    coco = COCO(out / "predictions.json")
    assert coco.imgs[391895]["file_name"] == "a.jpg" and {one["image_id"] for one in coco.anns.values()} == {391895}
    entries = list(coco.anns.values())
    assert len(entries) == done["objects"] > 0 and all("segmentation" not in one for one in entries)
    assert all(one["area"] == pytest.approx(one["bbox"][2] * one["bbox"][3]) for one in entries)


@pytest.fixture(scope="module")
def odd(runs, networks, folder, tmp_path_factory):
    """Runs, sources and folders that do not fit."""
    root = tmp_path_factory.mktemp("odd")
    (root / "run").mkdir()
    (root / "run" / "config.yaml").write_text(to_yaml(load(None, WORDS)[0]))
    write_run(root / "linear", nn.Linear(2, 2), {"backbone": "c0ffee"})
    write_run(root / "damaged", nn.Linear(2, 2), {})
    (root / "damaged" / "checkpoints" / "best").write_text("step-00000002")
    (root / "torn" / "checkpoints").mkdir(parents=True)
    (root / "torn" / "config.yaml").write_text(to_yaml(load(None, WORDS)[0]))
    (root / "torn" / "checkpoints" / "step-00000001").mkdir()
    (root / "none").mkdir()
    (root / "none" / "notes.txt").write_text("no image")
    (root / "twins").mkdir()
    for ending in ("jpg", "png"):
        draw(40, 40).save(root / "twins" / f"a.{ending}")
    return {"root": root, "folder": folder, **runs}


@pytest.mark.parametrize(
    "words, line",
    [
        ("{root}/nowhere {folder}", "no such folder; name a run folder of fastrot detect or segment"),
        ("{folder} {folder}", "is no run's; name a run folder"),
        ("{root}/run {folder}", "holds no sound checkpoint"),
        ("{root}/torn {folder}", "holds no sound checkpoint"),
        ("{root}/torn/checkpoints/step-00000001 {folder}", "not a sound checkpoint: manifest.json: No such file"),
        ("{root}/damaged {folder}", "best: cannot be read"),
        ("{root}/linear {folder}", "is no run of fastrot detect or segment"),
        ("{segment} {root}/none", "holds no image, nor does a folder below it"),
        ("{segment} {root}/nowhere", "no such folder"),
        ("{segment} {root}/twins", "a.jpg and a.png differ in their ending alone; rename one"),
        ("{segment} {folder} --min-score 0.5", "--min-score 0.5: is for detectors"),
        ("{fpn} {folder} --min-score 2", "--min-score 2: must be 0 to 1"),
        ("{fpn} {folder} --out {root}", "is there and not empty; name a new folder"),
        ("{fpn} {folder} --out {root}/none/notes.txt", "is there and not empty"),
        ("{fpn} {folder} --out {root}/none/notes.txt/out", "cannot be written (Not a directory)"),
    ],
)
def test_what_does_not_fit_is_one_line(words, line, odd, tmp_path, fastrot):
    asked = [word.format(**odd) for word in words.split()]
    out = () if "--out" in asked else ("--out", tmp_path / "out")
    done = fastrot("predict", *asked, *out)
    assert done.code == 2 and len(done.errors) == 1 and line in done.errors[0], done.err


def test_shards_and_launchers_are_refused(runs, folder, tmp_path):
    import tarfile

    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        shard.add(folder / "top.jpg", "top.jpg")
    ranks = distributed.start()
    try:
        with pytest.raises(UserError, match="no files of their own; name a folder"):
            predict(str(runs["segment"]), str(tmp_path / "a.tar"), str(tmp_path / "out"), None, ranks, ContactSheet)
        with pytest.raises(UserError, match="one process; start it without a launcher"):
            predict("", "", "", None, replace(ranks, world=2), ContactSheet)
    finally:
        distributed.end()


def test_a_sheet_shows_some_dozens_evenly_spread():
    sheet = ContactSheet([f"{n}.jpg" for n in range(1000)], [])
    assert len(sheet._rows) == 48 and {0, 999} <= sheet._rows
    assert len(ContactSheet(["a"], [])._rows) == 1
