"""Detection's task: its loss, what it finds in the image's own pixels, and what that is worth by pycocotools itself."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
import torchvision
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fastrot.data.index import index
from fastrot.data.manifest import Manifest
from fastrot.data.objects import Objects, read_objects
from fastrot.data.whole import WholeBatch
from fastrot.data.whole_objects import ShownObjects
from fastrot.tasks.detect import DetectTask, Found, paste
from fastrot.tasks.detection_figures import VOC, coco_figures, voc_figures

MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]


def shown(height, width, size, seed=0):
    pixels = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    masks = torch.zeros(1, height, width, dtype=torch.uint8)
    masks[0, 10:50, 8:60] = 1
    return ShownObjects(pixels, torch.tensor([[8.0, 10, 60, 50]]), torch.tensor([2]), masks, size)


@pytest.mark.parametrize("model", ["c4", pytest.param("fpn", marks=pytest.mark.slow)])
def test_its_loss_is_the_detectors_for_each_image_and_weights_come_from_the_seed(model):
    backbone = torchvision.models.resnet18()
    task = DetectTask(backbone, model, 3, 16, MEAN, STD, torch.device("cpu"), VOC)
    network = task.build_model("resnet18", 4).train()
    again = task.build_model("resnet18", 4)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))
    batch = WholeBatch(np.arange(2), [shown(64, 80, (32, 40)), shown(96, 64, (48, 32), 1)], 2, True)
    views = task.views(batch)
    torch.testing.assert_close(
        views[0], torchvision.transforms.functional.normalize(batch.samples[0].image.float(), MEAN, STD)
    )
    torch.manual_seed(0)
    loss, sums = task.loss(network, views, batch)
    torch.manual_seed(0)
    network = task.build_model("resnet18", 4).train()
    targets = [{"boxes": s.boxes, "labels": torch.tensor([3]), "masks": s.masks} for s in batch.samples]
    torch.manual_seed(0)
    losses = network(views, targets)
    assert loss.item() == pytest.approx(2 * sum(losses.values()).item(), rel=1e-5)
    summary = task.summary(sums)
    assert summary == pytest.approx({"loss": loss.item() / 2} | {k: v.item() for k, v in losses.items()}, rel=1e-5)


@pytest.mark.parametrize("model", ["c4", "fpn"])
def test_every_layer_of_a_frozen_backbone_learns(model):
    backbone = torchvision.models.resnet18().requires_grad_(False)
    network = DetectTask(backbone, model, 3, 16, MEAN, STD, torch.device("cpu"), VOC).build_model("resnet18", 0)
    assert all(p.requires_grad for p in network.parameters())


def test_what_it_finds_is_in_the_images_own_pixels():
    task = DetectTask(torchvision.models.resnet18(), "fpn", 3, 16, MEAN, STD, torch.device("cpu"), VOC)
    sample = shown(64, 80, (32, 40))
    boxes, cells = torch.tensor([[8.0, 10, 60, 50], [0, 0, 80, 64]]), torch.ones(2, 1, 28, 28)
    said = [{"boxes": boxes, "scores": torch.tensor([0.9, 0.2]), "labels": torch.tensor([1, 3]), "masks": cells}]
    (found,) = task.evaluate(lambda _views: said, [WholeBatch(np.array([7]), [sample], 1, False)])
    assert found.row == 7 and found.label.tolist() == [0, 2]
    assert found.box.tolist() == [[4, 5, 30, 25], [0, 0, 40, 32]]
    from pycocotools import mask as rle

    inside = rle.decode(found.masks[0])
    assert inside.shape == (32, 40) and inside[6:24, 5:29].all() and inside.sum() <= 26 * 20


def test_a_pasted_mask_fills_its_box():
    half = torch.zeros(1, 28, 28)
    half[:, :14] = 1  # its upper half
    got = paste(half, torch.tensor([[10.0, 4, 30, 24]]), (40, 50))[0] >= 0.5
    want = torch.zeros(40, 50, dtype=torch.bool)
    want[4:14, 10:30] = True
    assert (got ^ want).sum() <= 20  # at most a line of pixels


def judged(truth, results, kind):
    with contextlib.redirect_stdout(io.StringIO()):
        judge = COCOeval(truth, truth.loadRes(results), kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge.stats[:6]


def test_coco_figures_are_pycocotools_on_its_own_file_and_random_detections(shared_data, tmp_path):
    home = shared_data("coco_sample")
    file = home / "annotations" / "instances_val2017.json"
    manifest = Manifest.load(
        index(f"coco:{file}?images={home / 'val2017'}", tmp_path / "cache", 10**8, lambda items, *_: items)
    )
    objects = read_objects(manifest)
    sizes = np.stack([manifest.height, manifest.width], 1)
    rng = np.random.default_rng(0)
    found = []
    for row in range(len(objects)):
        mine = objects.of(row)
        count = mine.stop - mine.start
        if not count:
            found.append(Found(row, np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), []))
            continue
        box = objects.box[mine] + rng.normal(0, 3, (count, 4)).astype(np.float32)
        label = np.where(rng.random(count) < 0.8, objects.label[mine], 0)
        masks = [objects.rle_of(one, *sizes[row].tolist()) for one in range(mine.start, mine.stop)]
        found.append(Found(row, box, rng.random(count).astype(np.float32), label, masks))
    results = [
        {
            "image_id": int(objects.image_id[one.row]), "category_id": objects.category[one.label[at]],
            "bbox": [x1, y1, x2 - x1, y2 - y1], "score": float(one.score[at]),
            "segmentation": one.masks[at] | {"counts": one.masks[at]["counts"].decode()},
        }
        for one in found for at, (x1, y1, x2, y2) in enumerate(one.box.tolist())
    ]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
    got = coco_figures(objects, sizes, found, objects.has_masks)
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    written = json.loads(json.dumps(results))
    assert [got[name] for name in names] == pytest.approx(judged(truth, written, "bbox"), abs=2e-4)
    for one in written:
        del one["bbox"]
    assert [got[f"mask_{name}"] for name in names] == pytest.approx(judged(truth, written, "segm"), abs=1e-12)
    assert 0.2 < got["ap"] < 0.9
    for label in (0, int(objects.label[0])):
        mine = [one for one in results if one["category_id"] == objects.category[label]]
        alone = [{key: value for key, value in one.items() if key != "bbox"} for one in mine]
        with contextlib.redirect_stdout(io.StringIO()):
            judge = COCOeval(truth, truth.loadRes(alone), "segm")
            judge.params.catIds = [objects.category[label]]
            judge.evaluate()
            judge.accumulate()
            judge.summarize()
        assert got[f"mask_ap_{label}"] == pytest.approx(judge.stats[0], abs=1e-12)
    each = [got[f"mask_ap_{label}"] for label in range(len(objects.classes))]
    assert np.nanmean(each) == pytest.approx(got["mask_ap"]) and len(set(each)) > 5


def test_perfect_findings_are_perfect_and_none_are_nothing(shared_data, tmp_path):
    manifest = Manifest.load(
        index(f"voc:{shared_data('voc07')}?split=val", tmp_path / "cache", 10**8, lambda items, *_: items)
    )
    objects = read_objects(manifest)
    whole = [
        Found(r, objects.box[objects.of(r)], np.ones(len(objects.label[objects.of(r)]), np.float32), objects.label[objects.of(r)], [])
        for r in range(len(objects))
    ]  # fmt: skip
    assert set(voc_figures(objects, whole).values()) == {1.0}
    assert set(voc_figures(objects, []).values()) == {0.0}
    half = voc_figures(objects, whole[::2])
    each = [half[f"ap50_{label}"] for label in range(20)]
    assert np.mean(each) == pytest.approx(half["ap50"]) and len(set(each)) > 3
    assert 0.3 < half["ap50"] < 0.7 and half["ap50"] == pytest.approx(half["d2_ap50"], abs=1e-9)


def test_images_without_any_object_have_no_figure():
    none = np.zeros(0)
    objects = Objects(
        np.zeros(3, np.int64), np.zeros((0, 4), np.float32), none.astype(np.int64), none.astype(bool), none,
        none.astype(np.uint8), none.astype(np.int64), np.arange(2), ["a"], [1], {},
    )  # fmt: skip
    found = [Found(0, np.array([[0, 0, 5, 5]], np.float32), np.ones(1, np.float32), np.zeros(1, np.int64), [])]
    assert np.isnan(list(voc_figures(objects, found).values())).all()
    assert np.isnan(coco_figures(objects, np.full((2, 2), 9), found, False)["ap"])
    assert np.isnan(coco_figures(objects, np.full((2, 2), 9), [], False)["ap"])
