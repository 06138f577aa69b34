"""`fastrot index` as a user runs it: what it says of a source, and what --verify does to it."""

import os

import numpy as np
import pytest

from conftest import draw, write_folder
from fastrot.data.contents import histogram
from fastrot.data.sources.voc import CLASSES

pytestmark = pytest.mark.usefixtures("narrow")


def damaged(root) -> str:
    """One file of `root` cut in its middle, an end marker glued on."""
    path = root / "class0/1.jpg"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3] + b"\xff\xd9")
    return str(path)


def test_index_describes_a_source(tmp_path, fastrot):
    source = write_folder(tmp_path / "d", classes=2, per_class=3)
    (source / "class0/note.txt").write_text("x")
    for name in ("a", "b"):
        (source / f"class1/{name}.jpg").write_text("x")
    done = fastrot("index", source, "--json")
    assert (done.json["rows"], done.json["classes"], done.json["images_per_class"]) == (6, 2, [3, 3])
    assert done.json["kinds"] == {"JPEG": 6}
    assert done.json["bytes"] == sum(path.stat().st_size for path in source.rglob("[0-9].jpg"))
    assert done.json["skipped"] == {"other extension": 1}
    assert [place for place, _ in done.json["quarantined"]] == [str(source / f"class1/{n}.jpg") for n in "ab"]
    assert done.json["quarantined_reasons"] == {"not an image that Pillow knows": 2}
    assert done.json["verified"] is None
    sides = done.json["histograms"]["short_side_pixels"]
    assert (sum(sides["counts"]), sides["spread"][0]) == (6, 48)
    assert os.path.exists(os.path.join(done.json["manifest"], "meta.json"))
    for words in ("short side pixels", "file bytes", "\u2588", "all of them"):
        assert words in done.err


def test_no_label_is_no_class(tmp_path, fastrot):
    root = write_folder(tmp_path / "d", classes=2, per_class=3)
    (tmp_path / "l.txt").write_text("d/class0/0.jpg\t3\nd/class0/1.jpg\nd/class0/2.jpg\t3\nd/class1/0.jpg\t8\n")
    some = fastrot("index", f"list:{tmp_path / 'l.txt'}", "--json")
    assert (some.json["classes"], some.json["images_per_class"]) == (2, [1, 2])
    assert some.json["unlabelled"] == {"count": 1, "images": [str(root / "class0/1.jpg")]}
    assert any("1 of 4 images have no label, the first: " in line for line in some.json["remarks"])
    flat = fastrot("index", root / "class0", "--json")
    assert (flat.json["rows"], flat.json["classes"], flat.json["images_per_class"]) == (3, 0, [0, 0])
    assert flat.json["unlabelled"] == {"count": 3, "images": []}
    assert "no image has a label; rotation needs none" in flat.err


def test_a_folder_one_level_too_high_is_told(tmp_path, fastrot):
    write_folder(tmp_path / "d" / "train", classes=2, per_class=1)
    write_folder(tmp_path / "d" / "val", classes=2, per_class=1)
    done = fastrot("index", tmp_path / "d", "--json")
    want = f"its folders train, val look like splits, and are all in here; name one, as in {tmp_path}/d/train"
    assert done.json["remarks"] == [want]
    assert fastrot("index", tmp_path / "d/train", "--json").json["remarks"] == []


def test_rotation_trains_on_images_without_labels_and_what_needs_them_refuses(tmp_path, fastrot):
    flat = write_folder(tmp_path / "d", classes=1, per_class=6) / "class0"
    small = ["model.arch=resnet18", "data.crop=32", "optim.images_per_step=6", "engine.kind=plain", "data.decode=torch"]
    words = [*small, "optim.epochs=1", "optim.warmup_epochs=0", "run.tensorboard=false", f"data.train={flat}"]
    done = fastrot("train", *words, f"run.out={tmp_path / 'r'}", "--json")
    assert done.json["steps"] == 1 and "no image has a label" in done.err
    for command in ("linear", "finetune"):
        refused = fastrot(command, "--random-init", 0, *words, "rotation.views=one", f"run.out={tmp_path / command}")
        assert refused.code == 2
        assert f"{flat}: every image needs one class; 6 of 6 have none, the first: {flat}/0.jpg" in refused.errors[0]
    store = tmp_path / "store"
    assert fastrot("features", "--data", flat, "--out", store, "--random-init", 0, "--taps", "avg", *small).code == 0
    for probe in (["knn", "--train"], ["linear", "--features"]):
        refused = fastrot(*probe, store, "--test", store)
        assert refused.code == 2 and "6 of 6 rows have no label, and this probe needs them" in refused.errors[0]


def test_a_source_may_be_named_by_word_or_by_key_and_hold_an_equals_sign(tmp_path, fastrot):
    odd = write_folder(tmp_path / "a.b=c", classes=1, per_class=2)
    other = write_folder(tmp_path / "other", classes=1, per_class=3)
    assert fastrot("index", odd, "--json").json["rows"] == 2
    assert fastrot("index", "--json", "data.max_pixels=1000000", odd).json["rows"] == 2
    assert fastrot("index", f"data.train={other}", "--json").json["rows"] == 3
    assert fastrot("index", f"data.train={other}", odd, "--json").json["rows"] == 2
    wrong = fastrot("index", odd, other)
    assert wrong.code == 2 and f"'{other}': expected section.key=value" in wrong.err
    assert "unknown key data.trian; did you mean data.train?" in fastrot("index", "data.trian=x").err
    assert "data.train is not set" in fastrot("index").err


def test_names_that_are_no_text_are_told_all_the_same(tmp_path, fastrot):
    root = os.fsencode(tmp_path / "d") + b"-\xff"
    os.makedirs(os.path.join(root, b"c\xff"))
    for name in (b"1.jpg", b"2.jpg"):
        draw(20, 30).save(os.path.join(root, b"c\xff", name))
    with open(os.path.join(root, b"c\xff", b"bad-\xff.jpg"), "wb") as file:
        file.write(b"junk")
    done = fastrot("index", os.fsdecode(root), "--json", "--verify")
    assert (done.json["source"], done.json["rows"]) == (os.fsdecode(root), 2)
    assert len(done.json["quarantined"]) == 1


def test_verify_quarantines_damage_that_pillow_does_not_see(tmp_path, fastrot):
    source = write_folder(tmp_path / "d", classes=2, per_class=3)
    place = damaged(source)
    assert fastrot("index", source, "--json").json["rows"] == 6
    found = fastrot("index", source, "--verify", "--json")
    assert found.json["rows"] == 5
    ((path, reason),) = found.json["verified"]
    assert path == place and reason.startswith("Corrupt JPEG data")
    assert found.json["quarantined"] == found.json["verified"]
    again = fastrot("index", source, "--json")
    assert (again.json["rows"], again.json["quarantined"]) == (5, found.json["quarantined"])
    assert again.json["content"] == found.json["content"]
    assert fastrot("index", source, "--verify", "--json").json["verified"] == []


def test_a_file_that_changed_in_secret_is_found_by_decoding(tmp_path, fastrot):
    source = write_folder(tmp_path / "d", classes=2, per_class=3)
    fastrot("index", source)
    path = source / "class0/1.jpg"
    data, stat = path.read_bytes(), path.stat()
    path.write_bytes(data[:300] + bytes(len(data) - 302) + data[-2:])  # same size and time, other pixels
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert [p for p, _ in fastrot("index", source, "--verify", "--json").json["verified"]] == [str(path)]


def test_a_run_goes_on_with_its_frozen_rows_after_verify_took_some(tmp_path, fastrot):
    source = write_folder(tmp_path / "d", classes=1, per_class=6)
    damaged(source)
    words = ["train", "engine.kind=plain", "model.arch=resnet18", "data.crop=8", "optim.images_per_step=6",
             "optim.epochs=2", "optim.warmup_epochs=0", "run.tensorboard=false", f"data.train={source}"]  # fmt: skip
    first = f"run.out={tmp_path / 'r'}"
    assert fastrot(*words, first, "run.max_steps=1").code == 0
    fastrot("index", source, "--verify")
    assert fastrot(*words, first, "--json").json["steps"] == 2
    other = fastrot(*words, f"run.out={tmp_path / 's'}", "--resume", tmp_path / "r")
    assert other.code == 2 and "data was " in other.err


def test_multi_label_sources_say_present_and_ignored(shared_data, fastrot):
    done = fastrot("index", f"voc:{shared_data('voc07')}?split=train", "--json")
    by_class = done.json["multi_label"]
    assert list(by_class) == list(CLASSES)
    assert (by_class["person"]["present"], by_class["train"]["present"]) == (412, 39)  # the data set's own README
    assert "person 412" in done.err and "many an image" in done.err


def test_voc_streams_and_trains(shared_data, fastrot):
    source = f"data.train=voc:{shared_data('voc07')}?split=train"
    small = ["model.arch=resnet18", "data.crop=16", "optim.images_per_step=6"]
    two = [fastrot("stream", source, *small, "--steps", 3, "--ranks", r, "--json").json["sha256"] for r in (1, 3)]
    assert two[0] == two[1]
    done = fastrot("train", source, *small, "engine.kind=plain", "--dry-run", "--json")
    assert done.json["images_per_step"] == 6


@pytest.mark.parametrize("values", [[1], [1, 2, 3], [64] * 9, [500, 1, 7, 1 << 40], list(range(1, 3000))])
def test_every_value_falls_in_the_bin_whose_edges_hold_it(values):
    h = histogram(np.array(values))
    assert len(h["edges"]) == len(h["counts"]) + 1
    assert h["edges"] == sorted(set(h["edges"]))
    for low, high, count in zip(h["edges"], h["edges"][1:], h["counts"], strict=False):
        assert count == sum(low <= v < high for v in values)
    assert sum(h["counts"]) == len(values)
