"""Pascal VOC: twenty labels an image from the class lists, and what is wrong with a list."""

import hashlib
import os
import re
import struct
from xml.etree import ElementTree

import numpy as np
import pytest

from conftest import draw
from fastrot.data.index import index
from fastrot.data.manifest import Manifest
from fastrot.data.sources.voc import CLASSES
from fastrot.errors import UserError


def build(source, cache):
    return Manifest.load(index(str(source), cache, 10**8, lambda items, total, title: items))


def flag(image: int, column: int) -> int:
    """VOC's flag of an image and a class: each of 1, 0, -1 occurs."""
    return (image + column) % 3 - 1


@pytest.fixture
def voc(tmp_path):
    """Five images, ids not in the order of the lists, splits train (4) and val (1)."""
    root = tmp_path / "VOC2007"
    for folder in ("ImageSets/Main", "JPEGImages", "Annotations"):
        (root / folder).mkdir(parents=True)
    for i in range(5):
        draw(30 + i, 40).save(root / f"JPEGImages/00000{i}.jpg")
        (root / f"Annotations/00000{i}.xml").write_text("<annotation/>")
    for split, images in (("train", (3, 0, 2, 1)), ("val", (4,))):
        (root / f"ImageSets/Main/{split}.txt").write_text("".join(f"00000{i}\n" for i in images))
        for column, name in enumerate(CLASSES):
            lines = "".join(f"00000{i} {flag(i, column):2d}\n" for i in images)
            (root / f"ImageSets/Main/{name}_{split}.txt").write_text(lines)
    return root


def test_images_come_by_id_and_flags_become_present_absent_ignored(voc, tmp_path):
    manifest = build(f"voc:{voc}?split=train", tmp_path / "cache")
    assert [os.fsdecode(manifest.path(r)) for r in range(4)] == [f"{voc}/JPEGImages/00000{i}.jpg" for i in range(4)]
    meaning = {1: 1, -1: 0, 0: -1}
    assert manifest.label.dtype == np.int8
    assert manifest.label.tolist() == [[meaning[flag(i, c)] for c in range(20)] for i in range(4)]
    assert manifest.classes == sorted(manifest.classes) == list(CLASSES)
    assert manifest.skipped == {"image outside the split": 1}


def test_the_folder_of_the_year_is_found_below_the_root(voc, tmp_path):
    below = build(f"voc:{tmp_path}?split=val", tmp_path / "cache")
    assert len(below) == 1
    assert below.content == build(f"voc:{voc}?split=val", tmp_path / "cache").content


def test_the_content_hash_of_many_labels_is_as_documented(voc, tmp_path):
    manifest = build(f"voc:{voc}?split=train", tmp_path / "cache")
    want = hashlib.sha256()
    for row in range(len(manifest)):
        with open(manifest.path(row), "rb") as file:
            data = file.read()
        want.update(struct.pack("<qq20bq", manifest.height[row], 40, *manifest.label[row].tolist(), len(data)))
        want.update(hashlib.sha256(data[:4096]).digest())
    assert manifest.content == want.hexdigest()


def test_a_missing_xml_is_counted_and_its_image_stays(voc, tmp_path):
    (voc / "Annotations/000002.xml").unlink()
    manifest = build(f"voc:{voc}?split=train", tmp_path / "cache")
    assert len(manifest) == 4
    assert manifest.skipped["missing XML (labels need none)"] == 1


def test_a_changed_class_list_is_noticed(voc, tmp_path):
    first = build(f"voc:{voc}?split=train", tmp_path / "cache")
    path = voc / "ImageSets/Main/cat_train.txt"
    path.write_text(path.read_text().replace(" 1\n", "-1\n"))
    assert build(f"voc:{voc}?split=train", tmp_path / "cache").content != first.content


def edit(name, *change):
    def apply(root):
        path = root / "ImageSets/Main" / name
        path.write_text(path.read_text().replace(*change))

    return apply


@pytest.mark.parametrize(
    "damage, words",
    [
        (edit("cat_train.txt", "000002 -1", "000002  2"), "cat_train.txt: line 3: '000002  2'; expected"),
        (edit("cat_train.txt", "000002 -1", "000002"), "cat_train.txt: line 3: '000002'; expected"),
        (edit("cat_train.txt", "000002", "000003"), "cat_train.txt: line 3: image 000003 stands there twice"),
        (edit("cat_train.txt", "000002 -1\n", ""), "cat_train.txt: no entry of image 000002, which train.txt has"),
        (edit("train.txt", "000002\n", ""), "train.txt: no entry of image 000002, which aeroplane_train.txt has"),
        (lambda r: (r / "ImageSets/Main/cat_train.txt").write_text(""), "cat_train.txt: is empty"),
        (lambda r: (r / "ImageSets/Main/cat_train.txt").unlink(), "cat_train.txt: No such file or directory; expected"),
        (lambda r: (r / "ImageSets/Main/aeroplane_train.txt").unlink(), "aeroplane_train.txt: No such file"),
        (lambda r: (r / "ImageSets/Main/unicorn_train.txt").write_text(""), "'unicorn' is not one of VOC's 20 classes"),
        (lambda r: (r / "JPEGImages/000001.jpg").unlink(), "000001.jpg, which the class lists name (1 missing in all)"),
    ],
)
def test_what_is_wrong_with_the_lists_is_one_line(voc, tmp_path, damage, words):
    damage(voc)
    with pytest.raises(UserError, match="^[^\n]*$") as error:
        build(f"voc:{voc}?split=train", tmp_path / "cache")
    assert words in str(error.value)


@pytest.mark.parametrize(
    "end, words", [("?split=test", "no split 'test'"), ("", "no split ''"), ("?x=val", "no ImageSets")]
)
def test_a_split_that_is_not_there_names_those_that_are(voc, tmp_path, end, words):
    with pytest.raises(UserError, match=re.escape(words)) as error:
        build(f"voc:{voc}{end}", tmp_path / "cache")
    assert "(train, val)" in str(error.value) or end == "?x=val"


def test_real_labels_agree_with_the_annotations(shared_data, tmp_path):
    """The XML is the independent oracle: present where an object is not difficult, ignored where all are."""
    root = shared_data("voc07")
    manifest = build(f"voc:{root}?split=trainval", tmp_path / "cache")
    assert len(manifest) == 2060
    for row in range(0, 2060, 20):
        image = os.path.basename(os.fsdecode(manifest.path(row))).removesuffix(".jpg")
        want = dict.fromkeys(CLASSES, 0)
        for thing in ElementTree.parse(root / f"Annotations/{image}.xml").iter("object"):
            name, difficult = thing.findtext("name"), thing.findtext("difficult") == "1"
            want[name] = 1 if want[name] == 1 or not difficult else -1
        assert manifest.label[row].tolist() == list(want.values())
