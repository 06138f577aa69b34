"""The four configs of detection and segmentation against the protocol's own tables, cell by cell."""

import re
from functools import cache

import pytest
import torch
import torchvision

from conftest import ROOT, SHARED
from fastrot.config import load
from fastrot.models.detector import faster_rcnn_c4, mask_rcnn_fpn
from fastrot.runs.arithmetic import rate_at

PROTOCOL = SHARED.parent / "protocols.md"
DETECT = ("detect_voc0712_c4_24k", "detect_coco_fpn_1x")
SEGMENT = ("segment_voc12aug_fcn_20k", "segment_cityscapes_fcn_40k")


def config(name):
    return load(str(ROOT / f"configs/{name}.yaml"), [], name.split("_")[0])[0]


@cache
def network(name):
    with torch.device("meta"):
        build = mask_rcnn_fpn if "fpn" in name else faster_rcnn_c4
        return build(torchvision.models.resnet50(), 20, config(name).detect.regions)


def section(title):
    if not PROTOCOL.is_file():
        pytest.skip("the protocol is not beside this checkout")
    return PROTOCOL.read_text().split(f"## {title}")[1].split("\n## ")[0]


def table(title):
    """{row: [cell, cell]} of a section's table, in the order of the configs."""
    rows = [line.strip("|").split("|") for line in section(title).splitlines() if line.startswith("|")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows[2:]}


def numbers(text):
    return [float(n) for n in re.findall(r"\d*\.?\d+", text)]


def recipe(c):
    """The words of a schedule cell, from a config."""
    o = c.optim
    length = f"{o.steps:,} its" if o.steps else f"{o.epochs:g} epochs"
    at = ", ".join(f"{m / 1000:g}k" if o.steps else f"{m:g}" for m in o.milestones)
    return [length, f"÷{1 / o.gamma:g} at {at}", f"{o.warmup_steps} its ratio {o.warmup_ratio:g}"]


def test_detections_schedule_and_scales_are_the_tables():
    rows = table("7. Detection")
    for at, name in enumerate(DETECT):
        c, cell = config(name), {row: cells[at] for row, cells in rows.items()}
        for words in recipe(c):
            assert words in cell["Schedule"].replace("linear ", ""), name
        first, *_, last, longest = numbers(re.sub(r"\(step 32\)", "", cell["Train scale"]))
        assert c.detect.shorts == tuple(range(int(first), int(last) + 1, 32)) and c.detect.longest == longest
        assert f"{c.detect.test_short}/{c.detect.longest}" in cell["Test scale"]
        sampled = numbers(rows["RoI sampling"][0])
        assert c.detect.regions == sampled[0]
        o = c.optim
        said = section("7. Detection").split("|")[0]
        assert (
            f"= {o.images_per_step}." in said
            and f"SGD {o.momentum:g}, wd {o.weight_decay:.0e}".replace("e-04", "e-4") in said
        )
        assert f"lr {o.lr:g}." in said and f"h-flip {c.data.flip:g}" in said and c.model.sync_batchnorm
        assert [round(255 * v, 3) for v in (*c.data.mean, *c.data.std)] == numbers(
            re.search(r"Mean (.*?), RGB", said)[1]
        )


@pytest.mark.parametrize("at, name", [*enumerate(DETECT)])
def test_detections_numbers_of_the_network_are_the_tables(at, name):
    cell = {
        row: cells[at] if cells[at] not in ("same", "\u2013") else cells[0]
        for row, cells in table("7. Detection").items()
    }
    net = network(name)
    rpn, heads = net.rpn, net.roi_heads
    targets = numbers(cell["RPN targets"] if at == 0 else table("7. Detection")["RPN targets"][0])
    sampler = rpn.fg_bg_sampler
    matcher = rpn.proposal_matcher
    assert [matcher.high_threshold, matcher.low_threshold, matcher._floor] == targets[:3]
    assert [sampler.batch_size_per_image, 100 * sampler.positive_fraction] == targets[3:5]
    pre, nms = (rpn._pre_nms_top_n, rpn.nms_thresh)
    post = rpn._post_nms_top_n
    want = [pre["training"], pre["testing"], post["training"], post["testing"], nms]
    assert numbers(cell["Proposals train/test"]) == want
    assert rpn.head.conv[0][0].out_channels == numbers(cell["RPN"])[-1]
    assert heads.box_roi_pool.side == numbers(cell["RoI"])[0]
    sampled = numbers(table("7. Detection")["RoI sampling"][0])
    roi = heads.fg_bg_sampler
    assert [roi.batch_size_per_image, 100 * roi.positive_fraction, heads.proposal_matcher.high_threshold] == sampled[:3]
    judged = [heads.score_thresh, heads.nms_thresh, heads.detections_per_img]
    assert judged == numbers(table("7. Detection")["Test"][0])
    assert [1 / w for w in heads.box_coder.weights] == numbers(table("7. Detection")["Losses"][0])[-4:]
    if at == 0:
        assert [16 * n for n in numbers(cell["Anchors"])[1:6]] == [*rpn.anchor_generator.sizes[0]]


@pytest.mark.parametrize("at, name", [*enumerate(SEGMENT)])
def test_segmentations_recipe_is_the_tables(at, name):
    cell = {row: cells[at] for row, cells in table("8. Segmentation").items()}
    c = config(name)
    s, o = c.segment, c.optim
    assert s.classes == numbers(cell["Classes"])[0]
    assert o.images_per_step == numbers(cell["Batch"])[-1]
    base = next(row for row in cell if row.startswith("Resize base"))
    assert [*s.base] == numbers(cell[base]) and [*s.scales] == numbers(base)[:2]
    assert s.crop == numbers(cell["Crop / pad"].replace("²", ""))[0]
    assert str(s.align_corners) in cell["align_corners"]
    assert f"({s.base[0]},{s.base[1]})" in cell["Test"]
    assert ("slide" in cell["Test"]) == (s.slide is not None)
    if s.slide:
        assert f"{s.slide[0]}, stride {s.slide[1]}" in cell["Test"].replace("*", "")
    said = section("8. Segmentation")
    assert f"SGD lr {o.lr:g}, m {o.momentum:g}" in said and "**5e-4**" in said and o.weight_decay == 5e-4
    steps = int(re.search(r"_(\d+)k$", name)[1]) * 1000
    assert o.steps == steps and f"{steps // 1000}k" in section("8. Segmentation").split("\n| Classes")[0]
    every = re.search(r"Eval every (\d)k/(\d)k its", said)
    assert c.run.evaluate_every_steps == 1000 * int(every[at + 1]) and c.data.flip == 0.5


@pytest.mark.parametrize("name", SEGMENT)
def test_the_rate_falls_as_the_protocol_says_each_step(name):
    c = config(name)
    o, rows = c.optim, 10_582
    for t in (0, 1, 777, o.steps - 1):
        want = (0.01 - 1e-4) * (1 - t / o.steps) ** 0.9 + 1e-4
        assert rate_at(c, rows, t * o.images_per_step / rows) == pytest.approx(want, rel=1e-9)


def test_a_milestone_in_steps_is_passed_at_that_step():
    c, rows = config(DETECT[0]), 16_551
    rates = {t: rate_at(c, rows, t * 16 / rows) for t in (0, 50, 100, 17_999, 18_000, 21_999, 22_000, 23_999)}
    want = [2e-5, 0.02 * (1 - 0.999 / 2), 0.02, 0.02, 0.002, 0.002, 2e-4, 2e-4]
    assert [*rates.values()] == pytest.approx(want)
