"""Files that are not as they were indexed: noticed when opened, and before a run goes on."""

import errno
import os
import tarfile
from dataclasses import replace

import numpy as np
import pytest

from conftest import write_folder
from fastrot.data import pack as packing
from fastrot.data import reading, storage
from fastrot.data.index import in_cache, index
from fastrot.data.manifest import Manifest, changed_files
from fastrot.data.storage import FileStorage
from fastrot.errors import Fault, Unreadable, UserError
from fastrot_kernels import reader

pytestmark = pytest.mark.usefixtures("narrow")

SMALL = ["engine.kind=plain", "model.arch=resnet18", "data.crop=8", "optim.images_per_step=6", "optim.epochs=2",
         "optim.warmup_epochs=0", "run.tensorboard=false", "data.decode=torch"]  # fmt: skip


def plain(items, total, title):
    return items


@pytest.fixture
def manifest(tmp_path):
    return Manifest.load(index(str(write_folder(tmp_path / "d")), tmp_path / "cache", 10**8, plain))


def replaced(path: str | bytes) -> None:
    """Other bytes of the same length."""
    size = os.path.getsize(path)
    state = os.stat(path)
    with open(path, "r+b") as file:
        file.write(bytes(size))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))


def test_a_file_of_the_same_size_but_another_time_is_a_changed_file(manifest):
    replaced(manifest.path(5))
    good, bad = FileStorage(manifest).read(np.array([4, 5]))
    assert isinstance(good, np.ndarray)
    assert isinstance(bad, Unreadable) and str(bad).startswith("changed: written ")


def test_a_shard_replaced_by_one_of_its_size_is_noticed_for_all_its_images(manifest, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for row in range(3):
            tar.add(os.fsdecode(manifest.path(row)), f"{row}.jpg")
    shard = Manifest.load(index(str(tmp_path / "a.tar"), tmp_path / "cache", 10**8, plain))
    assert all(isinstance(buffer, np.ndarray) for buffer in FileStorage(shard).read(np.arange(3)))
    replaced(tmp_path / "a.tar")
    assert all(isinstance(buffer, Unreadable) for buffer in FileStorage(shard).read(np.arange(3)))
    assert len(changed_files(shard)[0]) == 1


def test_states_are_kept_by_save_and_manifests_without_them_still_load(manifest, tmp_path):
    manifest.save(tmp_path / "kept")
    assert np.array_equal(Manifest.load(tmp_path / "kept").file_state, manifest.file_state)
    (tmp_path / "kept/file_state.npy").unlink()
    old = Manifest.load(tmp_path / "kept")
    assert old.file_state is None and old.content == manifest.content
    replaced(manifest.path(0))
    os.truncate(manifest.path(1), 9)
    first, second = FileStorage(old).read(np.arange(2))
    assert isinstance(first, np.ndarray)  # its time was not kept
    assert isinstance(second, Unreadable) and "changed: 9 bytes" in str(second)
    assert [what[:16] for _, what in changed_files(old)[0]] == ["changed: 9 bytes"]


def test_a_cached_manifest_of_before_gets_its_files_states(manifest, tmp_path):
    (folder,) = (path.parent for path in (tmp_path / "cache").glob("*/file_state.npy"))
    (folder / "file_state.npy").unlink()
    index(str(tmp_path / "d"), tmp_path / "cache", 10**8, plain)
    assert np.array_equal(Manifest.load(folder).file_state, manifest.file_state)


def test_what_changed_is_told_by_file(manifest):
    assert changed_files(manifest) == ([], 12)
    replaced(manifest.path(2))
    os.truncate(manifest.path(4), 10)
    os.unlink(manifest.path(6))
    os.unlink(manifest.path(8))
    os.mkfifo(manifest.path(8))
    changed, looked = changed_files(manifest)
    assert looked == 12
    assert [path for path, _ in changed] == [manifest.name(row) for row in (2, 4, 6, 8)]
    words = ["changed: written", "changed: 10 bytes", "gone", "no regular file any more"]
    assert all(what.startswith(word) for (_, what), word in zip(changed, words, strict=True))
    assert changed_files(manifest.some(np.array([0, 1, 3, 5])))[0] == []


def test_beyond_a_number_files_are_compared_by_a_spread_sample(manifest):
    replaced(manifest.path(0))
    replaced(manifest.path(1))
    replaced(manifest.path(11))
    changed, looked = changed_files(manifest, most=4)
    assert looked == 4
    assert [path for path, _ in changed] == [manifest.name(0), manifest.name(11)]
    assert changed_files(manifest, most=12)[1] == 12


def test_a_read_error_while_running_is_tried_again(manifest, monkeypatch):
    calls, preadv = [], os.preadv

    def stumble(*words):
        calls.append(words)
        if len(calls) % 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(*words)

    monkeypatch.setattr(reading, "_PAUSES_S", (0, 0))
    monkeypatch.setattr(storage.os, "preadv", stumble)
    monkeypatch.setattr(reader.Reading, "result", lambda started: np.full(1, reader.LEFT))
    (buffer,) = FileStorage(manifest).read(np.array([3]))
    with open(manifest.path(3), "rb") as file:
        assert buffer.tobytes() == file.read()
    assert len(calls) == 3


def test_the_system_is_asked_again_only_where_its_answer_may_change(monkeypatch):
    monkeypatch.setattr(reading, "_PAUSES_S", (0, 0))
    for number, tries in ((errno.EIO, 3), (errno.ESTALE, 3), (errno.ENOENT, 1), (errno.EACCES, 1)):
        calls = []

        def work(number=number, calls=calls):
            calls.append(1)
            raise OSError(number, os.strerror(number))

        with pytest.raises(OSError):
            reading.again(work)
        assert len(calls) == tries
    assert isinstance(reading.refusal("x", OSError(errno.EACCES, "no")), UserError)
    assert isinstance(reading.refusal("x", OSError(errno.EIO, "no")), Fault)


def test_an_image_that_cannot_be_read_ends_packing(tmp_path, fastrot, monkeypatch):
    """A file without it would lack it for ever."""
    root = write_folder(tmp_path / "d", classes=1, per_class=3)

    def then_gone(*words):
        folder = in_cache(*words)
        (root / "class0/1.jpg").unlink()
        return folder

    monkeypatch.setattr(packing, "in_cache", then_gone)
    done = fastrot("pack", root, tmp_path / "d.beton")
    assert done.code == 3 and "class0/1.jpg: cannot be opened" in done.errors[0]
    assert not list(tmp_path.glob("*.beton"))


def test_a_run_goes_on_over_other_files_only_if_it_may(tmp_path, fastrot):
    source = write_folder(tmp_path / "d", classes=1, per_class=6)
    words = ["train", *SMALL, f"data.train={source}", f"data.val={source}", f"run.out={tmp_path / 'r'}"]
    assert fastrot(*words, "run.max_steps=1").code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file()}
    for name in ("0.jpg", "1.jpg"):
        os.utime(source / f"class0/{name}", ns=(5, 5))
    refused = fastrot(*words)
    assert refused.code == 2
    assert "2 of 6 files are not as the run saw them" in refused.err and "--resume-anyway data.files" in refused.err
    assert f"{source}/class0/1.jpg: changed: written 1970-01-01T00:00:00.000000005, " in refused.err
    for path in (tmp_path / "r/manifest").rglob("*.npy"):
        assert path.read_bytes() == before[path.name]
    anyway = fastrot(*words, "--resume-anyway", "data.files", "--json")
    assert anyway.json["steps"] == 2
    assert anyway.err.count("goes on with them as they are") == 2  # train and val
    assert not (tmp_path / "r/bad_images.jsonl").exists()
    assert fastrot(*words).code == 0  # as they are now is how the run knows them


def test_names_of_no_regular_file_are_one_line_not_a_wait(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    write_folder(tmp_path / "d", classes=1, per_class=1)
    for name, content in (("p", "pipe"), ("z", "/dev/zero"), ("f", "d")):
        (tmp_path / f"{name}.txt").write_text(f"d/class0/0.jpg\n{content}\n")
        with pytest.raises(UserError, match=r"is a folder, a pipe or a device; regular files alone are read \(1 such"):
            index(f"list:{tmp_path / f'{name}.txt'}", tmp_path / "cache", 10**8, plain)
    for source in (f"list:{tmp_path / 'pipe'}", "list:/dev/zero"):
        with pytest.raises(UserError, match=r"not a regular file"):
            index(source, tmp_path / "cache", 10**8, plain)
    for name in ("pipe.tar", "pipe.beton"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match="is a folder, a pipe or a device"):
            index(str(tmp_path / name), tmp_path / "cache", 10**8, plain)


def test_a_file_that_goes_between_listing_and_looking_is_one_line(manifest, tmp_path, monkeypatch):
    listed = reading.states

    def gone(paths):
        os.unlink(paths[3])
        return listed(paths)

    monkeypatch.setattr("fastrot.data.index.states", gone)
    with pytest.raises(UserError, match=r"3\.jpg is gone since it was listed[^\n]*$"):
        index(str(tmp_path / "d"), tmp_path / "other", 10**8, plain)


def test_another_time_alone_makes_no_other_content(manifest, tmp_path):
    os.utime(manifest.path(0), ns=(7, 7))
    again = Manifest.load(index(str(tmp_path / "d"), tmp_path / "cache", 10**8, plain))
    assert again.content == manifest.content and again.storage != manifest.storage
    assert replace(again, file_state=None).content == manifest.content
