"""The exact stream: golden values, and the laws that hold for every seed and size."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrot.data import augment
from fastrot.data.order import FullOrder, WindowOrder
from fastrot.data.plan import Plan, Sample, StreamHash, micro_steps_of, slice_of
from fastrot.data.randomness import CROP, below, philox, uniform

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "stream.json").read_text())
SEEDS = st.integers(0, 2**64 - 1)


def cases(name):
    return pytest.mark.parametrize("case", GOLDEN[name])


def one(case):
    return case["seed"], np.array([case["row"]]), np.array([case["epoch"]])


@cases("philox")
def test_philox_words(case):
    words = philox(case["seed"], case["row"], case["epoch"], case["purpose"], case["block"])
    assert words.tolist() == [case["words"]]


@pytest.mark.parametrize(
    "counter, key, words",
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers_of_its_paper(counter, key, words):
    row, seed = counter[0] | counter[1] << 32, key[0] | key[1] << 32
    got = philox(seed, np.array([row], np.uint64), np.array([counter[2]]), counter[3] >> 16, counter[3] & 0xFFFF)
    assert got.tolist() == [list(words)]


@cases("order")
def test_full_order(case):
    assert FullOrder(case["n"], case["seed"]).rows(np.array(case["positions"]), case["epoch"]).tolist() == case["rows"]


@cases("order_window")
def test_window_order(case):
    order = WindowOrder(case["n"], case["seed"], case["window_rows"], case["window_chunks"])
    assert order.rows(np.arange(case["n"]), case["epoch"]).tolist() == case["rows"]


@cases("sample")
def test_sample(case):
    seed, rows, epochs = one(case)
    size = np.array([case["height"]]), np.array([case["width"]])
    assert augment.crop_windows(seed, rows, epochs, *size).tolist() == [case["window"]]
    assert augment.flips(seed, rows, epochs).tolist() == [case["flip"]]
    assert augment.turns(seed, rows, epochs, "one").tolist() == [[case["turn"]]]


@cases("jitter")
def test_jitter(case):
    order, factors = augment.colour_jitter(*one(case), case["strength"], case["hue"])
    assert order.tolist() == [case["order"]]
    np.testing.assert_allclose(factors[0], case["factors"], rtol=1e-15)


@cases("lighting")
def test_lighting(case):
    np.testing.assert_allclose(augment.lighting(*one(case), case["std"])[0], case["alpha"], rtol=1e-12)


@cases("slice")
def test_slices(case):
    images, ranks, micro_steps = case["images_per_step"], case["ranks"], case["micro_steps"]
    got = [[list(slice_of(images, ranks, micro_steps, a, r)) for r in range(ranks)] for a in range(micro_steps)]
    assert got == case["slices"]


def golden_plan(case):
    sizes = [(100 + 7 * i % 300, 100 + 13 * i % 400) for i in range(37)]
    heights, widths = np.array(sizes, np.int32).T
    return Plan(case["seed"], heights, widths, FullOrder(37, case["seed"]), case["views"]), np.arange(37) % 5


@cases("stream")
def test_stream_hash(case):
    plan, labels = golden_plan(case)
    first = plan.at(case["first_step"] * 8, case["first_step"] * 8 + 8)
    want = case["first"]
    for name in ("rows", "windows", "flips", "turns"):
        assert getattr(first, name).tolist() == want[name], name
    assert labels[first.rows].tolist() == want["labels"]
    stream = StreamHash()
    for step in range(case["first_step"], case["first_step"] + case["steps"]):
        sample = plan.at(step * case["batch"], (step + 1) * case["batch"])
        stream.add(sample, labels[sample.rows])
    assert stream.hexdigest() == case["sha256"]


def test_many_labels_an_image_enter_the_hash_as_bytes():
    labels = np.random.default_rng(0).integers(-1, 2, (50, 20)).astype(np.int8)
    sample = Plan(3, np.full(50, 40), np.full(50, 60), FullOrder(50, 3)).at(45, 55)
    stream, want = StreamHash(), hashlib.sha256()
    stream.add(sample, labels[sample.rows])
    for row in sample.rows.tolist():
        want.update(row.to_bytes(8, "little"))
    want.update(sample.windows.astype("<i4").tobytes() + sample.flips.tobytes() + sample.turns.tobytes())
    for row in sample.rows.tolist():
        want.update(bytes(int(label) % 256 for label in labels[row]))
    assert stream.hexdigest() == want.hexdigest()


@given(SEEDS, st.integers(1, 3000), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_full_order_shows_every_row_once_an_epoch(seed, n, epoch):
    assert sorted(FullOrder(n, seed).rows(np.arange(n), epoch)) == list(range(n))


@pytest.mark.parametrize("n", [10**6, 10**9, 2**40 + 1])
def test_full_order_needs_no_memory_of_the_rows(n):
    """The epoch's last rows: each once, and the same in any slice."""
    order, positions = FullOrder(n, 5), np.arange(n - 2 * 10**5, n)
    rows = order.rows(positions, 3)
    assert rows.min() >= 0 and rows.max() < n
    assert len(np.unique(rows)) == len(positions)
    np.testing.assert_array_equal(order.rows(positions[4321:4325], 3), rows[4321:4325])


@given(SEEDS, st.integers(1, 400), st.integers(0, 99), st.integers(1, 60), st.integers(1, 9))
@settings(deadline=None, max_examples=40)
def test_window_order_shows_every_row_once_an_epoch(seed, n, epoch, chunk_rows, chunks):
    rows = WindowOrder(n, seed, chunk_rows, chunks).rows(np.arange(n), epoch)
    assert sorted(rows) == list(range(n))
    surely_first_window = chunk_rows * chunks - (chunk_rows - 1)  # the short chunk may lie in it
    assert len({row // chunk_rows for row in rows[:surely_first_window].tolist()}) <= chunks


def test_window_order_keeps_a_window_to_its_chunks():
    rows = WindowOrder(1000, 3, 10, 5).rows(np.arange(1000), 2)
    for start in range(0, 1000, 50):
        assert len({row // 10 for row in rows[start : start + 50].tolist()}) == 5


@given(SEEDS, st.integers(0, 10**6), st.integers(1, 50), st.integers(1, 9), st.integers(1, 4))
@settings(deadline=None, max_examples=40)
def test_shares_of_any_ranks_make_the_same_step(seed, first, images, ranks, micro_steps):
    plan, _ = golden_plan({"seed": seed, "views": "one"})
    whole = plan.at(first, first + images)
    parts = [
        plan.at(first + s, first + e)
        for a in range(micro_steps)
        for r in range(ranks)
        for s, e in [slice_of(images, ranks, micro_steps, a, r)]
        if e > s
    ]
    for name in vars(whole):
        np.testing.assert_array_equal(np.concatenate([vars(part)[name] for part in parts]), vars(whole)[name])


@given(st.integers(1, 5000), st.integers(1, 64), st.integers(2, 64))
def test_a_share_is_at_most_what_a_rank_holds_and_shares_differ_by_one(images, ranks, per_micro):
    micro_steps = micro_steps_of(images, ranks, per_micro)
    sizes = [
        e - s for a in range(micro_steps) for r in range(ranks) for s, e in [slice_of(images, ranks, micro_steps, a, r)]
    ]
    assert sum(sizes) == images
    assert max(sizes) <= per_micro
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1 or images < ranks, "no rank is left without an image"


@given(SEEDS, st.integers(1, 4000), st.integers(1, 4000), st.integers(0, 2**40))
@settings(deadline=None)
def test_windows_lie_in_the_image(seed, height, width, row):
    rows, epochs = np.array([row]), np.array([3])
    top, left, h, w = augment.crop_windows(seed, rows, epochs, np.array([height]), np.array([width]))[0]
    assert 0 <= top <= top + h <= height and h >= 1
    assert 0 <= left <= left + w <= width and w >= 1


def test_windows_follow_the_law_of_random_resized_crop():
    """Area and aspect of many windows against torchvision's own sampler on the same image."""
    import torch
    from scipy.stats import ks_2samp
    from torchvision.transforms import RandomResizedCrop

    n, height, width = 4000, 300, 400
    ours = augment.crop_windows(1, np.arange(n), np.zeros(n, np.int64), np.full(n, height), np.full(n, width))
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(n)])
    for measure in (lambda w: w[:, 2] * w[:, 3], lambda w: w[:, 3] / w[:, 2], lambda w: w[:, 0], lambda w: w[:, 1]):
        assert ks_2samp(measure(ours), measure(theirs)).pvalue > 1e-3


def test_uniform_and_below_cover_their_range():
    words = philox(5, np.arange(20000), 0, CROP)
    u = uniform(words)
    assert 0 <= u.min() < 0.001 and 0.999 < u.max() < 1
    assert set(below(words[:, 0], 7).tolist()) == set(range(7))


@pytest.mark.parametrize("height, width", [(375, 500), (500, 375), (128, 128), (97, 301)])
def test_a_shifted_box_shows_what_a_crop_of_the_central_square_shows(height, width):
    from PIL import Image
    from torchvision.transforms import CenterCrop, Compose, Resize

    from conftest import draw

    image, rows = draw(height, width, 1), np.arange(300)
    words = philox(9, rows, 2, CROP)
    sizes = np.full(300, height), np.full(300, width)
    boxes = augment.shifted_boxes(9, rows, np.full(300, 2), *sizes, 73, 64)
    square = Compose([Resize(73), CenterCrop(73)])(image)
    down, right = (below(words[:, column], 10) for column in (2, 3))
    assert set(down) == set(right) == set(range(10)), "from edge to edge"
    for row in rows[:4]:
        top, left, h, w = boxes[row]
        ours = image.resize((64, 64), Image.Resampling.BILINEAR, (left, top, left + w, top + h))
        theirs = square.crop((right[row], down[row], right[row] + 64, down[row] + 64))
        assert np.abs(np.asarray(ours, float) - np.asarray(theirs, float)).mean() < 0.6
    inside = (boxes[:, :2] >= -1e-9) & (boxes[:, :2] + boxes[:, 2:] <= np.array([height, width]) + 1)
    assert inside.all()


def test_boxes_enter_the_hash_whole():
    sizes = np.full(5, 90, np.int32), np.full(5, 120, np.int32)
    plan = Plan(3, *sizes, FullOrder(5, 3), shift=(73, 64))
    sha, moved = StreamHash(), StreamHash()
    step = plan.at(0, 5)
    sha.add(step, np.zeros(5, np.int64))
    moved.add(
        step.replaced(0, Sample(**{**vars(step.part(0, 1)), "windows": step.windows[:1] + 1e-6})), np.zeros(5, np.int64)
    )
    assert step.windows.dtype == np.float64 and sha.hexdigest() != moved.hexdigest()


@pytest.mark.parametrize("height, width", [(375, 500), (500, 375), (128, 128), (97, 301), (30, 20)])
def test_central_box_shows_what_resize_and_centre_crop_show(height, width):
    from PIL import Image
    from torchvision.transforms import CenterCrop, Compose, Resize

    from conftest import draw

    image = draw(height, width, 1)
    top, left, h, w = augment.central_boxes(np.array([height]), np.array([width]), 73, 64)[0]
    ours = image.resize((64, 64), Image.Resampling.BILINEAR, (left, top, left + w, top + h))
    theirs = Compose([Resize(73), CenterCrop(64)])(image)
    assert np.abs(np.asarray(ours, float) - np.asarray(theirs, float)).mean() < 0.6
