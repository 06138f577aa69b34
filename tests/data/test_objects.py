"""Objects: what VOC's and COCO's own readers see, faults in a line each."""

import json
from xml.etree import ElementTree

import numpy as np
import pytest
from pycocotools import mask as rle
from pycocotools.coco import COCO

from conftest import draw
from fastrot.data.index import index
from fastrot.data.manifest import Manifest
from fastrot.data.objects import Objects, read_objects
from fastrot.errors import UserError


def manifest_of(source, tmp_path):
    return Manifest.load(index(str(source), tmp_path / "cache", 10**8, lambda items, *_: items))


def coco_file(folder, objects, size=(40, 30), **more):
    """A file of two images, width x height; objects: dictionaries, completed."""
    folder.mkdir(exist_ok=True)
    for name in ("a", "b"):
        draw(size[1], size[0]).save(folder / f"{name}.jpg")
    images = [
        {"id": 10 + at, "file_name": f"{n}.jpg", "width": size[0], "height": size[1]} for at, n in enumerate("ab")
    ]
    full = [
        {"id": at, "image_id": 10, "category_id": 7, "iscrowd": 0, "area": 50.0} | one for at, one in enumerate(objects)
    ]
    content = {"images": images, "annotations": full, "categories": [{"id": 3, "name": "x"}, {"id": 7, "name": "y"}]}
    (folder / "objects.json").write_text(json.dumps(content | more))
    return f"coco:{folder / 'objects.json'}?images={folder}"


SQUARE = {"bbox": [5, 6, 10, 8], "segmentation": [[5, 6, 15, 6, 15, 14, 5, 14]]}


def test_coco_is_read_as_pycocotools_reads_it(shared_data, tmp_path):
    home = shared_data("coco_sample")
    for split in ("train2017", "val2017"):
        file = home / "annotations" / f"instances_{split}.json"
        manifest = manifest_of(f"coco:{file}?images={home / split}", tmp_path)
        got, judge = read_objects(manifest), COCO(str(file))
        assert got.category == judge.getCatIds() and len(got) == len(judge.getImgIds())
        for row, image in enumerate(got.image_id.tolist()):
            want = judge.loadAnns(judge.getAnnIds(image))
            mine = got.of(row)
            corners = np.array([[x, y, x + w, y + h] for x, y, w, h in (one["bbox"] for one in want)]).reshape(-1, 4)
            np.testing.assert_allclose(got.box[mine], corners, atol=0.51)
            assert [got.category[label] for label in got.label[mine]] == [one["category_id"] for one in want]
            assert got.aside[mine].tolist() == [bool(one["iscrowd"]) for one in want]
            height, width = manifest.height[row], manifest.width[row]
            for at, one in zip(range(mine.start, mine.stop), want, strict=True):
                assert np.array_equal(rle.decode(got.rle_of(at, height, width)), judge.annToMask(one))


def test_voc_is_read_as_its_files_stand(shared_data, tmp_path):
    home = shared_data("voc07")
    manifest = manifest_of(f"voc:{home}?split=val", tmp_path)
    got = read_objects(manifest)
    for row in range(0, len(manifest), 37):
        image = manifest.path(row).decode().rpartition("/")[2].removesuffix(".jpg")
        root = ElementTree.parse(home / "Annotations" / f"{image}.xml").getroot()
        want = [
            [int(b.find(f"bndbox/{c}").text) - 1 for c in ("xmin", "ymin", "xmax", "ymax")] for b in root.iter("object")
        ]
        assert got.box[got.of(row)].tolist() == want
        assert [got.classes[x] for x in got.label[got.of(row)]] == [b.find("name").text for b in root.iter("object")]
        assert got.aside[got.of(row)].tolist() == [b.find("difficult").text == "1" for b in root.iter("object")]
    assert set(got.learnable()) == {r for r in range(len(got)) if not got.aside[got.of(r)].all()}


def test_saved_and_chosen_rows_are_the_same_objects(tmp_path):
    other = {"bbox": [1, 1, 4, 5], "segmentation": [[1, 1, 5, 1, 5, 6]], "image_id": 11, "category_id": 3}
    manifest = manifest_of(coco_file(tmp_path / "c", [SQUARE, SQUARE | {"iscrowd": 1}, other]), tmp_path)
    read_objects(manifest).save(tmp_path / "o")
    got = Objects.load(tmp_path / "o")
    assert got.classes == ["x", "y"] and got.first.tolist() == [0, 2, 3] and got.aside.tolist() == [False, True, False]
    last = got.some(np.array([1]))
    assert last.box.tolist() == [[1, 1, 5, 6]] and last.label.tolist() == [0] and last.image_id.tolist() == [11]
    assert last.rle_of(0, 30, 40) == got.rle_of(2, 30, 40)
    (tmp_path / "o" / "box.npy").write_bytes(b"no")
    with pytest.raises(UserError, match="not objects that can be read"):
        Objects.load(tmp_path / "o")


def test_boxes_are_cut_to_the_image_and_empty_ones_left_out_and_counted(tmp_path):
    boxes = [[-5, -5, 20, 20], [39.5, 3, 10, 10], [3, 3, 0, 5], [9, 9, -4, 5], [0, 0, 40, 30]]
    got = read_objects(manifest_of(coco_file(tmp_path / "c", [{"bbox": box} for box in boxes]), tmp_path))
    assert got.box.tolist() == [[0, 0, 15, 15], [0, 0, 40, 30]] and not got.has_masks
    assert got.left_out == {
        "box cut at its image's border": 1,
        "box without a pixel in its image": 2,
        "box turned inside out": 1,
    }
    assert len(got) == 2 and got.of(1) == slice(2, 2)  # an image without any object


@pytest.mark.parametrize(
    "objects, more, line",
    [
        ([SQUARE | {"category_id": 9}], {}, "annotation 0 is of category 9, which is not listed"),
        ([SQUARE | {"image_id": 9}], {}, "annotation 0 is of image 9, which is not listed"),
        ([SQUARE, SQUARE | {"id": 0}], {}, "2 entries of kind annotation have the id 0"),
        ([SQUARE | {"bbox": [1, 2, 3]}], {}, r"not of COCO's format: annotations\.0\.bbox"),
        ([SQUARE | {"bbox": [1, 2, 3, float("nan")]}], {}, "not of COCO's format"),
        ([SQUARE | {"segmentation": {"size": [9, 9], "counts": [81]}}], {}, r"is of \[9, 9\], its image of \[30, 40\]"),
        ([SQUARE | {"segmentation": {"size": [30, 40], "counts": [81]}}], {}, "counts 81 pixels, its image has 1200"),
        ([SQUARE | {"segmentation": [[1, 2, 3, 4]]}], {}, "a polygon of fewer than three points"),
        ([SQUARE, {"bbox": [1, 1, 9, 9]}], {}, "1 of 2 objects have no mask; all or none"),
        ([SQUARE], {"images": []}, "annotation 0 is of image 10, which is not listed"),
        ([], {"images": []}, "lists no image"),
        ([], {"images": 3}, "not of COCO's format: images"),
    ],
)
def test_an_odd_file_is_refused_in_a_line(tmp_path, objects, more, line):
    source = coco_file(tmp_path / "c", objects, **more)
    with pytest.raises(UserError, match=line) as refused:
        read_objects(manifest_of(source, tmp_path))
    assert "\n" not in str(refused.value)


def test_other_faults_of_coco_sources_are_lines(tmp_path):
    source = coco_file(tmp_path / "c", [SQUARE])
    (tmp_path / "c" / "b.jpg").unlink()
    with pytest.raises(UserError, match=r"no such file .*b\.jpg, which objects\.json lists \(1 missing in all\)"):
        manifest_of(source, tmp_path)
    draw(40, 30).save(tmp_path / "c" / "b.jpg")  # its sides the other way round
    with pytest.raises(UserError, match=r"image 11 is listed as 40x30, but .*b\.jpg is 30x40 when upright"):
        read_objects(manifest_of(source, tmp_path))
    for rest, line in (
        ("x.json", "expected coco:FILE"),
        ("x.json?images=/nowhere", "no such folder"),
        (f"x.json?images={tmp_path}", "x.json: No such file"),
    ):
        with pytest.raises(UserError, match=line):
            manifest_of(f"coco:{rest}", tmp_path)
    (tmp_path / "odd.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match="odd.json: not JSON"):
        manifest_of(f"coco:{tmp_path / 'odd.json'}?images={tmp_path}", tmp_path)


@pytest.mark.parametrize(
    "was, becomes, line",
    [
        ("<name>chair</name>", "<name>stool</name>", "'stool' is not one of VOC's 20 classes"),
        ("<xmin>5</xmin>", "", "chair: its box is not four numbers"),
        ("<width>48</width>", "<width>47</width>", "is of an image of 47x40, found 48x40"),
        ("</annotation>", "", "not an annotation of VOC's"),
    ],
)
def test_an_odd_voc_annotation_is_refused_in_a_line(tmp_path, was, becomes, line):
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tmp_path / "voc" / folder).mkdir(parents=True)
    from fastrot.data.sources.voc import CLASSES

    for name in CLASSES:
        (tmp_path / "voc/ImageSets/Main" / f"{name}_train.txt").write_text("000001 -1\n")
    draw(40, 48).save(tmp_path / "voc/JPEGImages/000001.jpg")
    text = (
        "<annotation><size><width>48</width><height>40</height></size><object><name>chair</name><difficult>0</difficult>"
        "<bndbox><xmin>5</xmin><ymin>6</ymin><xmax>20</xmax><ymax>30</ymax></bndbox></object></annotation>"
    )
    file = tmp_path / "voc/Annotations/000001.xml"
    file.write_text(text)
    manifest = manifest_of(f"voc:{tmp_path / 'voc'}?split=train", tmp_path)
    assert read_objects(manifest).box.tolist() == [[4, 5, 19, 29]]
    file.write_text(text.replace(was, becomes))
    with pytest.raises(UserError, match=line):
        read_objects(manifest)
    file.unlink()
    with pytest.raises(UserError, match=r"000001\.xml: No such file"):
        read_objects(manifest)
