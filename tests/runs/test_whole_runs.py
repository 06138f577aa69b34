"""Detection and segmentation as a user runs them, on drawn images: resume, ranks, dry run, every refusal's one line."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image, ImageDraw
from pycocotools import mask as rle
from safetensors.torch import load_file
from torchvision.models import resnet18

from conftest import ROOT, draw, metrics
from fastrot.cli import main
from fastrot.data.sources.voc import CLASSES
from fastrot.models.backbone import load_backbone
from fastrot.models.detector import WithRegions, faster_rcnn_c4, mask_rcnn_fpn
from fastrot.profiling.memory import peak_of_step
from fastrot.runs.whole import Averaged
from workers.ranks import as_ranks

pytestmark = pytest.mark.usefixtures("narrow")

SMALL = [
    "--random-init", "0", "model.arch=resnet18", "rotation.views=one", "engine.kind=plain", "optim.images_per_step=2",
    "optim.lr=0.01", "optim.warmup_steps=1", "optim.steps=2", "run.log_every=1", "run.checkpoint_every=1",
    "run.tensorboard=false", "run.evaluate_every_steps=2", "data.threads=2", "data.prefetch=1",
]  # fmt: skip
DETECT = ["detect", *SMALL, "detect.shorts=[48,64]", "detect.test_short=48", "detect.longest=96", "detect.regions=16"]
SEGMENT = ["segment", *SMALL, "segment.base=[80,48]", "segment.crop=48", "segment.classes=3"]
COMMAND = "import sys; from fastrot.cli import main; sys.exit(main(sys.argv[1:]))"
SIZES = ((60, 80), (64, 64), (90, 60), (60, 100), (72, 64))
TIMES = {
    "images_per_s", "views_per_s", "step_s", "wait_share", "copy_share", "rotate_share", "compute_share", "update_share",
    "communicate_share", "host_share", "bound", "slow_step", "straggler", "memory_gib", "eta_s",
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
    mask.putpalette([*range(256)] * 3)  # as VOC's; without one a file keeps a bit a pixel
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


WHERE = {  # a network keeps its backbone, and stage 4
    "c4": ("backbone.body.", "roi_heads.box_head."),
    "fpn": ("backbone.stem.body.",) * 2,
    "segment": ("backbone.",) * 2,
}
JUDGED = {"c4": "held_out_ap50", "fpn": "held_out_ap", "segment": "held_out_mean_iou"}


def learnt(out):
    """What was logged, but for speeds."""
    return [{key: value for key, value in line.items() if key not in TIMES} for line in metrics(out)]


def same_weights(one, other, step):
    """Whether two runs hold the same bits after so many steps, momenta too."""
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(run / f"checkpoints/step-{step:08}" / name) for run in (one, other))
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[key], theirs[key]) for key in ours):
            return False
    return True


@pytest.mark.parametrize("kind", ["c4", "segment", pytest.param("fpn", marks=pytest.mark.slow)])
def test_stopped_and_resumed_is_the_run_that_was_not(kind, words, tmp_path, fastrot):
    whole = fastrot(*words[kind], f"run.out={tmp_path / 'whole'}", "--json")
    assert whole.code == 0, whole.err
    assert 0 <= whole.json[JUDGED[kind]] <= 1 and whole.json["steps"] == 2
    assert [line["step"] for line in metrics(tmp_path / "whole") if JUDGED[kind] in line] == [1]
    assert [line["lr"] for line in metrics(tmp_path / "whole") if "lr" in line] == pytest.approx([1e-3, 1e-2])
    assert json.loads((tmp_path / "whole/STATUS.json").read_text())["state"] == "done"
    for steps in (1, 2):
        done = fastrot(*words[kind], f"run.out={tmp_path / 'parts'}", f"run.max_steps={steps}")
        assert done.code == 0, done.err
    assert "resumed from step-00000001" in done.err
    ours, theirs = learnt(tmp_path / "parts"), learnt(tmp_path / "whole")
    last = {1: [line for line in ours if line["step"] == 0 and "loss" not in line]}  # evaluated where it stopped
    assert json.dumps([line for line in ours if line not in last[1]]) == json.dumps(theirs)
    assert same_weights(tmp_path / "parts", tmp_path / "whole", 2)
    theirs = load_file(tmp_path / "whole/checkpoints/step-00000002/model.safetensors")
    backbone, _ = load_backbone(str(tmp_path / "whole"))
    for key, value in backbone.state_dict().items():
        body, stage_4 = WHERE[kind]
        assert torch.equal(value, theirs[(stage_4 if key.startswith("layer4") else body) + key]), key


@pytest.mark.slow
def test_killed_in_the_middle_and_begun_again_is_the_run_that_was_not(words, tmp_path, fastrot):
    longer = [*words["c4"], "optim.steps=8", "run.checkpoint_every=3", "run.evaluate_every_steps=8"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert fastrot(*longer, f"run.out={whole}").code == 0
    process = subprocess.Popen([sys.executable, "-c", COMMAND, *longer, f"run.out={killed}"], cwd=ROOT)
    while process.poll() is None and not (killed / "checkpoints/latest").exists():
        pass
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 3 <= len(metrics(killed)) < 8
    done = fastrot(*longer, f"run.out={killed}")
    assert done.code == 0 and "resumed from step-0000000" in done.err, done.err
    assert json.dumps(learnt(killed)) == json.dumps(learnt(whole)) and same_weights(killed, whole, 8)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["segment", "c4"])
def test_a_step_in_two_parts_is_of_the_same_images_and_size(kind, words, tmp_path, fastrot):
    first = []
    for parts in ("null", "2"):
        more = ["optim.images_per_step=4", f"engine.images_per_micro_step={parts}", f"run.out={tmp_path / parts}"]
        done = fastrot(*words[kind], *more, "run.max_steps=1")
        assert done.code == 0, done.err
        first.append(metrics(tmp_path / parts)[0])
    whole, in_parts = first
    assert in_parts["loss"] == pytest.approx(whole["loss"], rel=0.1)  # norms, dropout and sampled regions differ
    assert in_parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=0.5)


@pytest.mark.parametrize("kind", ["segment", pytest.param("c4", marks=pytest.mark.slow)])
def test_two_ranks_learn_from_the_same_images_and_judge_the_same(kind, words, tmp_path, fastrot):
    out = f"run.out={tmp_path / 'r'}"
    deepspeed = ["engine.kind=deepspeed", out, "--json"]
    said = as_ranks(2, main, [*words[kind], *deepspeed])
    two = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
    again = fastrot(*words[kind], out, "--json")  # nothing is left to learn: one rank judges what two have made
    assert again.code == 0, again.err
    names = [name for name in two if name.startswith("held_out_")]
    assert JUDGED[kind] in names and two["steps"] == 2
    assert [again.json[name] for name in names] == pytest.approx([two[name] for name in names], abs=2e-3, nan_ok=True)


def test_a_dry_run_says_the_plan_and_writes_nothing(words, tmp_path, fastrot):
    done = fastrot(*words["segment"], f"run.out={tmp_path / 'r'}", "--dry-run", "--json")
    assert done.json["steps"] == 2 and done.json["images_per_step"] == 2 and done.json["memory_estimate_gib"] > 0
    assert done.json["views_per_s"] > 0 and not (tmp_path / "r").exists()
    assert "0.7 epochs of 6 images" in done.err + done.out


@pytest.mark.parametrize(
    "kind, more, words_of_it",
    [
        ("c4", ["detect.model=fpn"], "has no masks, which detect.model fpn learns; set detect.model=c4"),
        ("c4", ["rotation.views=all"], "rotation.views must be one"),
        ("c4", ["data.train={pairs}"], "has no boxes; name voc:ROOT?split=S or coco:"),
        ("c4", ["data.val={coco}"], "other classes than"),
        ("segment", ["data.train={voc}"], "has no masks; name vocseg:"),
        ("segment", ["segment.classes=2"], "holds class 2; segment.classes 2 allows 0 to 1, and 255 for none"),
        ("segment", ["optim.warmup_steps=null"], "optim.steps counts the run in steps; set optim.warmup_steps too"),
        ("segment", ["segment.scales=[2,1]"], "segment.scales [2.0, 1.0] must rise"),
    ],
)
def test_what_does_not_fit_is_one_line(kind, more, words_of_it, words, voc, tmp_path, fastrot):
    sources = {
        "pairs": f"pairs:{voc}/JPEGImages,{voc}/SegmentationClass",
        "voc": f"voc:{voc}?split=trainval",
        "coco": words["fpn"][-1].partition("=")[2],
    }
    done = fastrot(*words[kind], f"run.out={tmp_path / 'r'}", *(one.format(**sources) for one in more))
    assert done.code == 2 and len(done.errors) == 1 and words_of_it in done.errors[0], done.err


def test_a_resume_refuses_other_masks_and_other_objects(tmp_path, fastrot):
    voc = write_voc(tmp_path / "voc", range(2))
    masks, boxes = f"pairs:{voc}/JPEGImages,{voc}/SegmentationClass", f"voc:{voc}?split=trainval"
    runs = {"segment.masks": [*SEGMENT, f"data.train={masks}"], "detect.objects": [*DETECT, f"data.train={boxes}"]}
    for key, line in runs.items():
        assert fastrot(*line, f"run.out={tmp_path / key}", "run.max_steps=1").code == 0
    mask_of(2).resize(picture(0).size).save(voc / "SegmentationClass/000000.png")
    (voc / "Annotations/000000.xml").write_text(xml_of(0).replace("<xmax>41", "<xmax>30"))
    for key, line in runs.items():
        done = fastrot(*line, f"run.out={tmp_path / key}")
        assert done.code == 2 and len(done.errors) == 1 and f"{key} was" in done.errors[0], done.err


@pytest.mark.parametrize("build", [faster_rcnn_c4, mask_rcnn_fpn])
def test_the_estimate_of_memory_counts_what_a_detectors_heads_keep(build):
    network, side = build(resnet18(), 3, 32).train(), 96
    box = torch.tensor([[8.0, 8, 60, 60]])
    target = {"boxes": box, "labels": torch.tensor([1]), "masks": torch.ones(1, side, side, dtype=torch.uint8)}
    kept = {t.untyped_storage().data_ptr() for t in network.parameters()}
    saved = {}

    def pack(tensor):
        if tensor.is_floating_point() and (of := tensor.untyped_storage()).data_ptr() not in kept:
            saved[of.data_ptr()] = of.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = network([torch.randn(3, side, side)] * 2, [target] * 2)
    estimate = peak_of_step(Averaged(network, WithRegions(network)), 2, 3, side, torch.float32)
    assert losses and 0.9 < estimate / sum(saved.values()) < 1.6


@pytest.mark.slow
@pytest.mark.parametrize("command, kind", [(DETECT, "voc"), (SEGMENT, "vocseg")])
def test_profile_times_whole_images_by_the_config_alone(fastrot, voc, command, kind):
    words = [word for word in command[3:] if not word.startswith("run.")]
    found = fastrot("profile", *words, f"data.train={kind}:{voc}?split=trainval", "--seconds", "0.5", "--json").json
    assert set(found["stages"]) == {"cold", "warm", "data", "step", "both"} and found["roofline"] == {}
    assert found["says"].startswith("bound by ")
