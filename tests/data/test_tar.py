"""Tar shards: the same rows as the folder they were made from, and what is wrong with a shard."""

import io
import os
import tarfile
from dataclasses import replace

import numpy as np
import pytest

from conftest import draw, write_folder
from fastrot.data.index import index
from fastrot.data.manifest import Manifest
from fastrot.data.sources import tar as tar_source
from fastrot.data.storage import FileStorage
from fastrot.errors import BadImage, UserError


def build(source, cache):
    return Manifest.load(index(str(source), cache, 10**8, lambda items, total, title: items))


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def jpeg(seed: int = 0) -> bytes:
    out = io.BytesIO()
    draw(30, 40, seed).save(out, "JPEG")
    return out.getvalue()


def shard_folder(folder: Manifest, out, shards: int = 3, **options) -> None:
    """The rows of a folder, in order, spread over shards, labels in .cls."""
    rows = np.array_split(np.arange(len(folder)), shards)
    for number, mine in enumerate(rows):
        with tarfile.open(out / f"s-{number:03d}.tar", "w", **options) as tar:
            for row in mine:
                with open(folder.path(row), "rb") as file:
                    add(tar, f"dir.with.dots/{row:05d}.jpg", file.read())
                add(tar, f"dir.with.dots/{row:05d}.cls", b"%d" % folder.label[row])


@pytest.mark.parametrize("spec", ["s-{000..002}.tar", "s-*.tar"])
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_shards_hold_the_rows_of_their_folder(tmp_path, spec, form):
    folder = build(write_folder(tmp_path / "d"), tmp_path / "cache")
    shard_folder(folder, tmp_path, format=form)
    shards = build(tmp_path / spec, tmp_path / "cache")
    assert shards.content == folder.content
    assert shards.label.tolist() == folder.label.tolist()
    rows = np.arange(len(folder))
    for ours, theirs in zip(FileStorage(shards).read(rows), FileStorage(folder).read(rows), strict=True):
        assert ours.tobytes() == theirs.tobytes()
    assert " at byte " in shards.name(1)


def test_processes_list_shards_as_threads_do(tmp_path, monkeypatch):
    shard_folder(build(write_folder(tmp_path / "d"), tmp_path / "cache"), tmp_path)
    with tarfile.open(tmp_path / "s-003.tar", "w") as tar:
        for name in ("a.jpg", "a.png", "a.cls", "a.txt"):
            add(tar, name, b"?" if name == "a.cls" else jpeg())
    found = []
    for large in (0, 1 << 30):
        monkeypatch.setattr(tar_source, "_LARGE", large)
        found.append(tar_source.open_source(str(tmp_path / "s-*.tar"), lambda items, total, title: items))
    for name in ("file", "offset", "length", "labels"):
        np.testing.assert_array_equal(getattr(found[0], name), getattr(found[1], name))
    assert found[0].skipped == found[1].skipped == {"member of another kind": 1}
    assert found[0].faults == found[1].faults and len(found[0].faults) == 2


def test_labels_come_from_cls_json_or_not_at_all(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "a.cls", b"3\n")
        add(tar, "a.jpg", jpeg())
        add(tar, "b.jpg", jpeg())
        add(tar, "b.json", b'{"label": 5, "width": 1}')
        add(tar, "c.jpg", jpeg())
        add(tar, "c.txt", b"a caption")
        add(tar, "d.seg.png", jpeg())
        add(tar, "d.cls", b"cat")
    manifest = build(tmp_path / "a.tar", tmp_path / "cache")
    assert manifest.label.tolist() == [3, 5, -1, -1]
    assert manifest.skipped == {"member of another kind": 1}
    assert [reason for _, reason in manifest.quarantined] == ["its label is not an integer"]


def test_what_is_sound_in_a_damaged_shard_is_read_and_the_rest_listed(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        add(tar, "k" * 150 + ".jpg", jpeg(1))  # a long name
        add(tar, "b.jpg", jpeg(2))
        add(tar, "b.png", jpeg(3))  # two images a key
        link = tarfile.TarInfo("c.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "b.jpg"
        tar.addfile(link)
        link.name, link.linkname = "d.jpg", "nothing.jpg"
        tar.addfile(link)
        add(tar, "e.jpg", b"no image")
        add(tar, "f.jpg", jpeg(4))
        sparse = tarfile.TarInfo("g.jpg")
        sparse.type = tarfile.GNUTYPE_SPARSE
        tar.addfile(sparse)
    whole = (tmp_path / "a.tar").read_bytes()
    manifest = build(tmp_path / "a.tar", tmp_path / "cache")
    assert len(manifest) == 4  # long name, b, its link c, f
    assert manifest.offset[1] == manifest.offset[2]
    reasons = sorted(reason for _, reason in manifest.quarantined)
    assert reasons == [
        "a hard link to nothing before it",
        "a second image of its key",
        "a sparse member",
        "not an image that Pillow knows",
    ]

    cut = whole[: int(manifest.offset[3]) + 100]
    (tmp_path / "cut.tar").write_bytes(cut)
    shorter = build(tmp_path / "cut.tar", tmp_path / "cache")
    assert len(shorter) == 3
    assert any("ends before" in reason or "read to its end" in reason for _, reason in shorter.quarantined)


def test_a_shard_that_shrinks_after_indexing_is_noticed(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(3):
            add(tar, f"{i}.jpg", jpeg(i))
    manifest = build(tmp_path / "a.tar", tmp_path / "cache")
    os.truncate(tmp_path / "a.tar", int(manifest.offset[2]) + 5)
    for bad in FileStorage(manifest).read(np.array([0, 2])):  # nobody knows whose bytes the first are now
        assert isinstance(bad, BadImage) and "changed" in str(bad)
    without_states = replace(manifest, file_state=None)  # as manifests were
    good, bad = FileStorage(without_states).read(np.array([0, 2]))
    assert good.tobytes() == jpeg(0)
    assert isinstance(bad, BadImage) and "changed" in str(bad)


def test_unchanged_shards_are_not_listed_again_and_a_changed_one_is(tmp_path, monkeypatch):
    for number in range(2):
        with tarfile.open(tmp_path / f"s-{number}.tar", "w") as tar:
            add(tar, "a.jpg", jpeg(number))
    source = tmp_path / "s-{0..1}.tar"
    first = build(source, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr("fastrot.data.sources.tar._samples", None)
        assert build(source, tmp_path / "cache").content == first.content
    with tarfile.open(tmp_path / "s-1.tar", "a") as tar:
        add(tar, "b.jpg", jpeg(7))
    assert len(build(source, tmp_path / "cache")) == 3


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda p: p / "none.tar", "no such file"),
        (lambda p: (tarfile.open(p / "s-0.tar", "w").close(), p / "s-{0..1}.tar")[1], "s-1.tar (1 missing in all)"),
        (lambda p: p / "x*.tar", "no such file"),
        (lambda p: (tarfile.open(p / "z.tar.gz", "w:gz").close(), p / "z.tar.gz")[1], "unpack it first: gunzip"),
        (lambda p: ((p / "j.tar").write_bytes(b"junk" * 500), p / "j.tar")[1], "is no tar file"),
        (lambda p: (tarfile.open(p / "e.tar", "w").close(), p / "e.tar")[1], "hold no image"),
    ],
)
def test_shards_with_nothing_to_read_are_one_line(tmp_path, make, words):
    with pytest.raises(UserError) as error:
        build(make(tmp_path), tmp_path / "cache")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_real_shards_are_read_as_they_are(shared_data, tmp_path):
    manifest = build(shared_data("cifar10") / "train-{000000..000003}.tar", tmp_path / "cache")
    assert len(manifest) == 4000
    assert np.bincount(manifest.label).tolist() == [400] * 10
    assert set(zip(manifest.height.tolist(), manifest.width.tolist(), strict=True)) == {(32, 32)}
