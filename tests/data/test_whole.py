"""Whole images: the plan's own order, for any number of ranks, resumed, with bad ones replaced."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import write_folder
from fastrot.data.bad_images import BadImages
from fastrot.data.index import index
from fastrot.data.manifest import Manifest
from fastrot.data.objects import Objects
from fastrot.data.order import FullOrder
from fastrot.data.plan import Plan
from fastrot.data.whole import WholeLoader
from fastrot.data.whole_masks import MaskView
from fastrot.data.whole_objects import ObjectView
from fastrot.errors import Fault


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "images", classes=3, per_class=4)


def opened(folder, tmp_path):
    return Manifest.load(index(str(folder), tmp_path / "cache", 10**8, lambda items, *_: items))


def loader(manifest, prepare=lambda image, row, epoch: (row, epoch, image.size), most=10):
    return WholeLoader(manifest, FullOrder(len(manifest), 5), prepare, BadImages(None, "s", most), 2, 2, 60.0)


def seen(steps):
    return [[(rows.rows.tolist(), rows.samples, rows.last) for rows in step.micro_steps] for step in steps]


def micro_steps(steps):
    return [batch for step in steps for batch in step.micro_steps]


def test_rows_and_epochs_are_the_plans_for_any_ranks_and_after_any_resume(folder, tmp_path):
    manifest = opened(folder, tmp_path)
    plan = Plan(5, manifest.height, manifest.width, FullOrder(len(manifest), 5))
    whole = seen(loader(manifest).train(range(7), 0, 5, 1, 0, 1))
    for step, ((rows, samples, last),) in enumerate(whole):
        want = plan.at(5 * step, 5 * step + 5)
        pairs = list(zip(want.rows.tolist(), want.epochs.tolist(), strict=True))
        tall = [pair for pair in pairs if manifest.height[pair[0]] > manifest.width[pair[0]]]
        assert [sample[:2] for sample in samples] == [pair for pair in pairs if pair not in tall] + tall
        assert rows == [sample[0] for sample in samples] and last
        assert [sample[2] for sample in samples] == [(manifest.width[r], manifest.height[r]) for r in rows]
    assert seen(loader(manifest).train(range(3, 7), 15, 5, 1, 0, 1)) == whole[3:]
    parts = [seen(loader(manifest).train(range(7), 0, 5, 2, rank, 2)) for rank in range(2)]
    for step, ((rows, _, _),) in enumerate(whole):
        shares = [part[step][micro] for micro in range(2) for part in parts]
        assert [row for share in shares for row in share[0]] == rows
        assert [share[2] for share in shares] == [False, False, True, True]


def box_a_row(n):
    """Objects of n images, one each."""
    box, one, none = np.tile(np.float32([4, 6, 30, 28]), (n, 1)), np.arange(n), np.zeros(0, np.uint8)
    ends = np.zeros(0, np.int64)
    return Objects(np.arange(n + 1), box, one % 3, one < 0, one + 1.0, none, ends, one, ["a", "b", "c"], [1, 2, 3], {})


@pytest.mark.parametrize("kind", ["objects", "masks"])
def test_two_ranks_show_what_one_shows_to_the_last_bit(kind, folder, tmp_path):
    manifest = opened(folder, tmp_path)

    def mask_of(row):
        return np.random.default_rng(row).integers(0, 4, (manifest.height[row], manifest.width[row]), np.uint8)

    view = {
        "objects": ObjectView(box_a_row(len(manifest)), 7, (40, 48, 56), 48, 90, 0.5),
        "masks": MaskView(mask_of, 7, (80, 50), (0.5, 2.0), 32, 0.5, True),
    }[kind]

    def bits(samples):
        return [{name: v.numpy().tobytes() for name, v in vars(one).items() if name != "size"} for one in samples]

    one = [bits(batch.samples) for batch in micro_steps(loader(manifest, view).train(range(6), 0, 4, 1, 0, 1))]
    two = [micro_steps(loader(manifest, view).train(range(6), 0, 4, 2, rank, 1)) for rank in range(2)]
    assert [bits(a.samples) + bits(b.samples) for a, b in zip(*two, strict=True)] == one
    assert len({len(sample["image"]) for step in one for sample in step}) > 1 or kind == "masks"  # of several scales


def test_evaluation_shows_every_row_once_over_the_ranks(folder, tmp_path):
    manifest = opened(folder, tmp_path)
    parts = [list(loader(manifest).held_out(5, rank, 2)) for rank in range(5)]
    assert [row for part in parts for batch in part for row in batch.rows.tolist()] == list(range(12))
    assert {epoch for part in parts for batch in part for _, epoch, _ in batch.samples} == {-1}


def test_a_bad_image_is_replaced_by_the_next_row_and_listed(folder, tmp_path):
    manifest = opened(folder, tmp_path)
    for row in (3, 11):
        path = Path(manifest.path(row).decode())
        data = path.read_bytes()
        path.write_bytes(data[:200] + bytes(len(data) - 200))
    bad = tmp_path / "bad.jsonl"
    held = WholeLoader(manifest, FullOrder(12, 5), lambda _, row, __: row, BadImages(bad, "s", 5), 2, 2, 60.0)
    shown = [row for batch in held.held_out(1, 0, 4) for row in batch.samples]
    assert shown == [0, 1, 2, 4, 4, 5, 6, 7, 8, 9, 10, 0]
    assert len(bad.read_text().splitlines()) == 2


def test_what_goes_wrong_in_a_thread_is_raised_where_the_batch_is_asked_for(folder, tmp_path):
    def broken(_image: Image.Image, _row: int, _epoch: int) -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(loader(opened(folder, tmp_path), broken).held_out(1, 0, 4))


def test_a_thread_that_hangs_is_a_fault_that_names_the_source(folder, tmp_path):
    import threading

    manifest, gate = opened(folder, tmp_path), threading.Event()
    held = WholeLoader(manifest, FullOrder(12, 5), lambda *_: gate.wait(), BadImages(None, "s", 5), 2, 2, 0.05)
    with pytest.raises(Fault, match=r"no batch for data\.timeout 0\.05 s.*images"):
        next(held.held_out(1, 0, 4))
    gate.set()
    held.close()


def test_order_is_a_permutation_each_epoch(folder, tmp_path):
    rows = [row for step in seen(loader(opened(folder, tmp_path)).train(range(6), 0, 4, 1, 0, 1)) for row in step[0][0]]
    assert all(np.array_equal(np.sort(rows[at : at + 12]), np.arange(12)) for at in (0, 12))
