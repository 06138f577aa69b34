"""The loader against the plan: right pixels for every rank, bad images replaced by the rule."""

import json
import os
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from conftest import write_folder
from fastrot.data.bad_images import BadImages
from fastrot.data.decode import make_decoder
from fastrot.data.index import index
from fastrot.data.loader import DECODES_IN_FLIGHT, Loader
from fastrot.data.manifest import Manifest
from fastrot.data.order import FullOrder
from fastrot.data.plan import Plan
from fastrot.data.storage import FileStorage, Reading
from fastrot.errors import BadImage, Fault

CPU = torch.device("cpu")


@pytest.fixture
def source(tmp_path):
    return Manifest.load(index(str(write_folder(tmp_path / "d")), tmp_path / "cache", 10**8, lambda i, n, t: i))


def loader(manifest, decode="torch", views="all", bad=None, storage=None, timeout=60.0, device=CPU):
    plan = Plan(5, manifest.height, manifest.width, FullOrder(len(manifest), 5), views)
    decoder, _ = make_decoder(decode, "cpu", torch.device("cpu"), 2, 16, DECODES_IN_FLIGHT)
    return Loader(
        manifest,
        plan,
        storage or FileStorage(manifest),
        decoder,
        bad or BadImages(None, "d", 10),
        device,
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


GPU = torch.device("cuda", 0)


class Played:
    """CUDA's part played on the host. said: each copy with the streams it is on, and each wait, in order."""

    def __init__(self, monkeypatch):
        self.said, self.pinned, self.there = [], {}, {}  # tensors by address: kept, so that no address comes twice
        self._current, self._to, self._clone = [], torch.Tensor.to, torch.Tensor.clone
        self.own = SimpleNamespace(record_event=lambda: SimpleNamespace(synchronize=self.saying("an event")))
        for name, stand_in in (
            ("Stream", lambda device: self.own), ("stream", self.stream), ("set_device", lambda device: None),
            ("default_stream", lambda device: "step's"), ("synchronize", self.saying("the device")),
        ):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *words, **options: self.to(tensor, words, options))
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: self.pin(tensor))
        monkeypatch.setattr(torch.Tensor, "clone", lambda tensor: self.clone(tensor))
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, one: self.said.append(f"kept for {one}"))

    def saying(self, what):
        return lambda *_: self.said.append(f"waits for {what}")

    @contextmanager
    def stream(self, one):
        self._current.append(one)
        yield
        self._current.pop()

    def to(self, tensor, words, options):
        if GPU not in words:
            return self._to(tensor, *words, **options)
        if tensor.data_ptr() in self.there:
            return tensor
        assert options["non_blocking"] and tensor.data_ptr() in self.pinned
        return self.placed(self._clone(tensor), "to the device")

    def pin(self, tensor):
        self.said.append("to pinned memory")
        copy = self._clone(tensor)
        self.pinned[copy.data_ptr()] = copy
        return copy

    def clone(self, tensor):
        return self.placed(self._clone(tensor), "on the device") if self._current else self._clone(tensor)

    def placed(self, tensor, how):
        """A tensor of the device."""
        self.said.append(how + (", its own stream" if self._current == [self.own] else ", the step's"))
        self.there[tensor.data_ptr()] = tensor
        return tensor


PINNED = ["to pinned memory"] * 2  # flips, turns
STEPS = ["to the device, the step's"] * 2


def test_a_cpu_decoders_crops_are_copied_beside_the_step(source, monkeypatch):
    """All copies and waits of a batch, as docs/architecture.md counts them."""
    played = Played(monkeypatch)
    (want,) = next(loader(source).train(range(1), 0, 8, 1, 0, 1, lambda epoch: 20)).micro_steps
    assert not played.said
    (got,) = next(loader(source, device=GPU).train(range(1), 0, 8, 1, 0, 1, lambda epoch: 20)).micro_steps
    crops = ["to pinned memory", "to the device, its own stream", "waits for an event", "kept for step's"]
    assert played.said == crops + PINNED
    moved = got.to(GPU)
    assert played.said == crops + PINNED + STEPS
    assert torch.equal(moved.pixels, want.pixels) and torch.equal(moved.turns, want.turns)


def test_a_gpu_decoders_crops_are_copied_once_there(source, monkeypatch):
    """As above, where DALI decodes on the GPU: its pipeline is played by a list of crops."""
    from fastrot.data.decode import dali

    played, fed = Played(monkeypatch), []
    crops = torch.arange(8 * 20 * 20 * 3).remainder(251).byte().reshape(8, 20, 20, 3)
    pipe = SimpleNamespace(
        feed_input=lambda name, data: fed.append(name), schedule_run=lambda: None, release_outputs=lambda: None,
        share_outputs=lambda: (SimpleNamespace(as_tensor=lambda: crops),),
    )  # fmt: skip
    monkeypatch.setattr(dali, "from_dlpack", lambda shared: shared)
    made = loader(source, device=GPU)
    made._decoder = dali.DaliDecoder(0, 1, 8, 1)
    made._decoder._pipes[False] = pipe
    monkeypatch.setattr(made, "_moved", lambda pixels: pixels)  # `is_cuda` of a host's tensor is false
    (got,) = next(made.train(range(1), 0, 8, 1, 0, 1, lambda epoch: 20)).micro_steps
    assert fed == ["data", "start", "shape", "size"]
    there = ["on the device, its own stream", "waits for an event", "kept for step's"]
    assert played.said == there + PINNED
    assert torch.equal(got.to(GPU).pixels, crops) and played.said == there + PINNED + STEPS


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


class Answers:
    """Storage whose bytes are the row's number; and a decoder that shows the row, and its window's place."""

    name = "answers"

    def __init__(self, unread: set[int], undecoded: set[int]):
        self._unread, self._undecoded, self._flying = unread, undecoded, []

    def start(self, rows):
        return lambda: self.read(rows)

    def read(self, rows):
        return [BadImage("unread") if row in self._unread else np.array([row], np.uint8) for row in rows.tolist()]

    def submit(self, batch):
        self._flying.append(batch)

    def result(self):
        batch = self._flying.pop(0)
        bad = {at: "undecoded" for at, (row,) in enumerate(batch.buffers) if int(row) in self._undecoded}
        return self._pixels(batch), bad

    def one(self, batch):
        if int(batch.buffers[0][0]) in self._undecoded:
            raise BadImage("undecoded")
        return self._pixels(batch)[0]

    def close(self):
        pass

    @staticmethod
    def _pixels(batch):
        shown = [
            (int(buffer[0]), *window[:2].tolist()) for buffer, window in zip(batch.buffers, batch.windows, strict=True)
        ]
        return torch.tensor(shown, dtype=torch.uint8).reshape(-1, 1, 1, 3)


@pytest.fixture(scope="module")
def twelve(tmp_path_factory):
    root = tmp_path_factory.mktemp("twelve")
    return Manifest.load(index(str(write_folder(root / "d")), root / "cache", 10**8, lambda i, n, t: i))


@given(
    bad=st.dictionaries(st.integers(0, 11), st.booleans(), max_size=11),
    epoch=st.integers(0, 3),
    images=st.integers(1, 14),
    views=st.sampled_from(["one", "all"]),
)
@example(bad={11: True}, epoch=1, images=12, views="one")  # the last row: the first comes after it
@example(bad=dict.fromkeys([3, 4, 5, 6], False), epoch=0, images=12, views="one")
@settings(max_examples=80, deadline=None)
def test_a_bad_row_shows_the_next_sound_one_of_its_epoch(twelve, bad, epoch, images, views):
    """Its own window, flip, turns and label; every other row as planned; the bad ones met are listed, no others."""
    answers = Answers({row for row in bad if bad[row]}, {row for row in bad if not bad[row]})
    listed = BadImages(None, "d", 12)
    made = loader(twelve, views=views, bad=listed, storage=answers)
    made._decoder = answers
    (step,) = made.train(range(1), 12 * epoch + 5, images, 1, 0, 1, lambda epoch: 1)
    (micro,) = step.micro_steps
    met = set()
    planned = made.plan.at(step.position, step.position + images)
    for at, (row, of) in enumerate(zip(planned.rows.tolist(), planned.epochs.tolist(), strict=True)):
        while row in bad:
            met.add(twelve.name(row))
            row = (row + 1) % 12
        want = made.plan.of(np.array([row]), np.array([of]))
        assert micro.sample.rows[at] == row and micro.labels[at] == twelve.label[row]
        assert micro.pixels[at].flatten().tolist() == [row, *want.windows[0, :2].tolist()]
        assert micro.flips[at] == want.flips[0]
        np.testing.assert_array_equal(micro.turns[at], want.turns[0])
    assert listed._known == met


def test_a_frozen_manifest_without_orientations_shows_the_same(tmp_path):
    """What runs froze before it was kept: Pillow's rule is asked as an image is decoded."""
    root = write_folder(tmp_path / "d", classes=1)
    for orientation, path in enumerate(sorted(root.rglob("*.jpg")), 5):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.open(path).save(path, exif=exif)
    folder = index(str(root), tmp_path / "cache", 10**8, lambda i, n, t: i)
    new = Manifest.load(folder)
    assert new.orientation.tolist() == [5, 6, 7, 8]
    (folder / "orientation.npy").unlink()
    meta = folder / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"format": 3}))
    old = Manifest.load(folder)
    old.save(tmp_path / "again")  # as a run freezes it
    for manifest in (old, Manifest.load(tmp_path / "again")):
        assert manifest.orientation.tolist() == [0] * 4 and manifest.content == new.content
        ((pixels, *_),) = collect(lambda m=manifest: loader(m, "turbo"), range(1), images=4)
        ((want, *_),) = collect(lambda: loader(new, "turbo"), range(1), images=4)
        assert torch.equal(pixels, want)


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
            reading = Reading(source, rows, lambda: [BadImage("late")] * len(rows) if answer.wait() else [])
            reading.pending = lambda: 1
            return reading

    made = loader(source, storage=Stuck(source), timeout=0.3)
    second = source.name(int(made.plan.at(1, 2).rows[0]))
    with pytest.raises(Fault, match=f"no batch for data.timeout 0.3 s: the loader was reading rows .*, at {second}$"):
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
