"""The loader against the plan: right pixels for every rank, bad images replaced by the rule."""

import json
import os

import numpy as np
import pytest
import torch

from conftest import write_folder
from fastrot.data.bad_images import BadImages
from fastrot.data.decode import make_decoder
from fastrot.data.loader import DECODES_IN_FLIGHT, Loader
from fastrot.data.manifest import Manifest, index
from fastrot.data.order import FullOrder
from fastrot.data.plan import Plan
from fastrot.data.storage import FileStorage
from fastrot.errors import BadImage, Fault


@pytest.fixture
def source(tmp_path):
    return Manifest.load(index(str(write_folder(tmp_path / "d")), tmp_path / "cache", 10**8, lambda i, n, t: i))


def loader(manifest, decode="torch", views="all", bad=None, storage=None, timeout=60.0):
    plan = Plan(5, manifest.height, manifest.width, FullOrder(len(manifest), 5), views)
    decoder, _ = make_decoder(decode, "cpu", torch.device("cpu"), 2, 16, DECODES_IN_FLIGHT)
    return Loader(
        manifest,
        plan,
        storage or FileStorage(manifest),
        decoder,
        bad or BadImages(None, "d", 10),
        torch.device("cpu"),
        2,
        timeout,
    )


def collect(make, steps, ranks=1, micro_steps=1, images=8):
    """Pixels, turns and labels of each step, put together over ranks and micro-steps."""
    per_rank = []
    for rank in range(ranks):
        one = make()
        batches = one.train(steps, steps.start * images, images, ranks, rank, micro_steps, lambda epoch: 20)
        per_rank.append([(b.step, list(b.micro_steps)) for b in batches])
        one.close()
    out = []
    for at in range(len(steps)):
        parts = [per_rank[r][at][1][a] for a in range(micro_steps) for r in range(ranks)]
        out.append(
            tuple(torch.cat([getattr(p, name) for p in parts]) for name in ("pixels", "flips", "turns"))
            + (np.concatenate([p.labels for p in parts]), np.concatenate([p.sample.rows for p in parts]))
        )
    return out


@pytest.mark.parametrize("decode", ["torch", "dali"])
@pytest.mark.parametrize("ranks, micro_steps", [(2, 1), (3, 1), (2, 2)])
def test_any_number_of_ranks_and_micro_steps_sees_the_same_steps(source, decode, ranks, micro_steps):
    want = collect(lambda: loader(source, decode), range(3, 7))
    got = collect(lambda: loader(source, decode), range(3, 7), ranks, micro_steps)
    for a, b in zip(want, got, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))
        np.testing.assert_array_equal(a[3], b[3])
        np.testing.assert_array_equal(a[4], b[4])


def test_labels_rows_and_turns_are_the_plans(source):
    made = loader(source, views="one")
    (step,) = made.train(range(2, 3), 16, 8, 1, 0, 1, lambda epoch: 20)
    (micro,) = step.micro_steps
    want = made.plan.at(16, 24)
    np.testing.assert_array_equal(micro.sample.rows, want.rows)
    np.testing.assert_array_equal(micro.labels, source.label[want.rows])
    np.testing.assert_array_equal(micro.turns.numpy(), want.turns)
    assert micro.views_of_step == 8
    assert step.epoch == 16 / len(source)


def test_the_crop_grows_with_the_epoch(source):
    made = loader(source)
    sizes = [
        next(b.micro_steps).pixels.shape[1] for b in made.train(range(4), 0, 6, 1, 0, 1, lambda e: 16 if e < 1 else 24)
    ]
    assert sizes == [16, 16, 24, 24]


def test_held_out_shares_cover_every_row_once(source):
    rows = []
    for rank in range(5):
        for batch in loader(source).held_out(5, rank, 2, 30, 24):
            rows += batch.sample.rows.tolist()
            assert batch.turns.tolist() == [[0, 1, 2, 3]] * len(batch.sample)
    assert rows == list(range(len(source)))


@pytest.mark.parametrize("decode", ["torch", "dali"])
def test_a_bad_image_is_replaced_by_the_next_row_and_listed(source, decode, tmp_path):
    (clean,) = collect(lambda: loader(source, decode, "one"), range(1), images=12)
    gone, broken = 4, 9
    os.remove(source.path(gone))
    path = os.fsdecode(source.path(broken))
    with open(path, "r+b") as file:
        file.write(b"\0" * 300)
    listing = tmp_path / "bad_images.jsonl"
    (got,) = collect(lambda: loader(source, decode, "one", BadImages(listing, "d", 10)), range(1), images=12)
    plan = loader(source, decode, "one").plan
    assert 5 in clean[4] and 10 in clean[4]
    for at, row in enumerate(clean[4]):
        if row in (gone, broken):
            instead = row + 1
            like = int(np.flatnonzero(clean[4] == instead)[0])
            assert got[4][at] == instead
            assert torch.equal(got[0][at], clean[0][like])  # that row's own window
            assert got[2][at] == plan.of(np.array([instead]), np.array([0])).turns[0]
            assert got[3][at] == source.label[instead]
        else:
            assert got[4][at] == row and torch.equal(got[0][at], clean[0][at])
    lines = [json.loads(line) for line in listing.read_text().splitlines()]
    assert sorted(line["row"] for line in lines) == [gone, broken]
    assert any("cannot be opened" in line["reason"] for line in lines)


def test_each_source_has_its_own_limit_and_ranks_share_the_list(tmp_path):
    listing = tmp_path / "bad.jsonl"
    for rank in range(2):  # the second rank meets the same images
        training = BadImages(listing, "train", 3)
        for row in range(3):
            training.add(f"t{row}", row, f"reason of rank {rank}")
    BadImages(listing, "val", 1).add("v", 0, "reason")
    assert len(listing.read_text().splitlines()) == 4
    with pytest.raises(Fault, match="4 unreadable images"):
        BadImages(listing, "train", 3).add("t9", 9, "reason")


def test_too_many_bad_images_stop_the_run(source):
    for row in range(6):
        os.remove(source.path(row))
    made = loader(source, bad=BadImages(None, "d", 3))
    with pytest.raises(Fault, match="more than data.max_bad 3"):
        for batch in made.train(range(3), 0, 12, 1, 0, 1, lambda epoch: 20):
            list(batch.micro_steps)


def test_storage_that_never_answers_ends_the_run_with_what_it_waited_for(source):
    import threading

    answer = threading.Event()

    class Stuck(FileStorage):
        def start(self, rows):
            return lambda: [BadImage("late")] * len(rows) if answer.wait() else []

    made = loader(source, storage=Stuck(source), timeout=0.3)
    with pytest.raises(Fault, match="no batch for data.timeout 0.3 s: the loader was reading rows"):
        for batch in made.train(range(1), 0, 4, 1, 0, 1, lambda epoch: 20):
            next(batch.micro_steps)
    answer.set()


def test_a_changed_file_is_noticed_when_it_is_opened(source):
    with open(source.path(2), "ab") as file:
        file.write(b"more")
    (buffer,) = FileStorage(source).read(np.array([2]))
    assert isinstance(buffer, BadImage) and "changed" in str(buffer)


def test_reading_returns_the_bytes_of_each_row(source):
    buffers = FileStorage(source).read(np.array([3, 0]))
    for buffer, row in zip(buffers, (3, 0), strict=True):
        with open(source.path(row), "rb") as file:
            assert buffer.tobytes() == file.read()
