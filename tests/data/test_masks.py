"""Masks beside a manifest's rows: every layout, against Pillow; every odd case a line. Joined sets."""

import numpy as np
import pytest
from PIL import Image

from conftest import draw
from fastrot.data.index import index
from fastrot.data.manifest import Manifest
from fastrot.data.masks import PALETTE, names_of, read_masks
from fastrot.errors import UserError


def opened(source, tmp_path):
    return Manifest.load(index(source, tmp_path / "cache", 10**8, lambda items, *_: items))


def pattern(width, height, values, seed=0):
    cells = np.random.default_rng(seed).choice(np.array(values, np.uint8), (height, width))
    return Image.fromarray(cells)


@pytest.fixture
def pairs(tmp_path):
    """Two images below folders of their own, and their masks."""
    for number in range(2):
        for kind in ("images", "masks"):
            (tmp_path / kind / f"{number}").mkdir(parents=True)
        draw(30, 40, number).save(tmp_path / f"images/{number}/a.jpg")
        pattern(40, 30, (0, 1, 255), number).save(tmp_path / f"masks/{number}/a.png")
    return tmp_path


def spec(root):
    return f"pairs:{root}/images,{root}/masks"


def test_a_pair_of_folders_gives_each_image_the_mask_of_its_path(pairs):
    masks = read_masks(opened(spec(pairs), pairs), 2)
    for row in range(2):
        np.testing.assert_array_equal(masks(row), np.asarray(Image.open(pairs / f"masks/{row}/a.png")))
    assert len(masks.some(np.array([1]))) == 1 and masks.some(np.array([1]))(0).tolist() == masks(1).tolist()


def test_a_mask_that_says_how_it_lies_is_turned_as_its_image_is(pairs):
    exif = Image.Exif()
    exif[0x0112] = 6
    draw(30, 40).save(pairs / "images/0/a.jpg", exif=exif)
    mask = pattern(40, 30, (0, 1))
    mask.save(pairs / "masks/0/a.png", exif=exif)
    manifest = opened(spec(pairs), pairs)
    assert (manifest.height[0], manifest.width[0]) == (40, 30)
    upright = np.asarray(mask.transpose(Image.Transpose.ROTATE_270))
    np.testing.assert_array_equal(read_masks(manifest, 2)(0), upright)
    mask.save(pairs / "masks/0/a.png")  # it lies as the file does
    with pytest.raises(UserError, match="is 40x30, its image 30x40 when upright"):
        read_masks(manifest, 2)(0)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda file: pattern(39, 30, (0, 1)).save(file), "is 39x30, its image 40x30"),
        (lambda file: pattern(40, 30, (0, 7)).save(file), "holds class 7; segment.classes 2 allows 0 to 1"),
        (lambda file: draw(30, 40).save(file), "has colours"),
        (lambda file: file.write_bytes(b"no image"), "is no mask that can be read"),
        (lambda file: file.write_bytes(file.read_bytes()[:60]), "is (damaged|no mask)"),
    ],
)
def test_what_is_no_mask_is_one_line(pairs, make, words):
    manifest = opened(spec(pairs), pairs)
    make(pairs / "masks/0/a.png")
    with pytest.raises(UserError, match=words) as raised:
        read_masks(manifest, 2)(0)
    assert "\n" not in str(raised.value)


def test_content_is_of_every_mask(pairs):
    masks = read_masks(opened(spec(pairs), pairs), 2)
    before = masks.content()
    pattern(40, 30, (0, 1, 255), 9).save(pairs / "masks/1/a.png")
    assert masks.content() != before


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda root: (root / "masks/0/a.png").unlink(), "no such mask .*0/a.png \\(1 missing in all\\)"),
        (lambda root: draw(9, 9).save(root / "images/0/a.png"), "a.jpg and a.png share the mask"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(pairs, change, words):
    change(pairs)
    with pytest.raises(UserError, match=words):
        opened(spec(pairs), pairs)


def write_vocseg(root):
    for folder in ("JPEGImages", "ImageSets/Segmentation", "SegmentationClass", "SegmentationClassAug"):
        (root / folder).mkdir(parents=True)
    for at, name in enumerate("abc"):
        draw(20, 24, at).save(root / f"JPEGImages/{name}.jpg")
        folder = "SegmentationClassAug" if name == "c" else "SegmentationClass"
        pattern(24, 20, (0, at + 1, 255), at).save(root / f"{folder}/{name}.png")
    (root / "ImageSets/Segmentation/train.txt").write_text("b\na\n")
    (root / "ImageSets/Segmentation/aug.txt").write_text("c\n")
    return root


def test_vocs_masks_and_sbds_beside_them(tmp_path):
    root = write_vocseg(tmp_path / "voc")
    masks = read_masks(opened(f"vocseg:{root}?split=train+aug", tmp_path), 21)
    assert [file.name for file in masks.files] == ["b.png", "a.png", "c.png"]
    assert set(np.unique(masks(2))) == {0, 3, 255}
    with pytest.raises(UserError, match=r"val.txt: .*; name a split"):
        opened(f"vocseg:{root}?split=val", tmp_path)
    (root / "ImageSets/Segmentation/aug.txt").write_text("c\na\n")
    with pytest.raises(UserError, match="image a is of split aug and of another"):
        opened(f"vocseg:{root}?split=train+aug", tmp_path)


def test_cityscapes_ids_become_train_ids(tmp_path):
    for folder in ("leftImg8bit", "gtFine"):
        (tmp_path / folder / "train/ulm").mkdir(parents=True)
    draw(16, 32).save(tmp_path / "leftImg8bit/train/ulm/ulm_0_leftImg8bit.png")
    ids = np.arange(34, dtype=np.uint8)[:32].reshape(1, 32).repeat(16, 0).copy()
    ids[0, :2] = 32, 33
    Image.fromarray(ids).save(tmp_path / "gtFine/train/ulm/ulm_0_gtFine_labelIds.png")
    masks = read_masks(opened(f"cityscapes:{tmp_path}?split=train", tmp_path), 19)
    # cityscapesScripts' labels.py: road 7 -> 0, sidewalk 8 -> 1, building 11 -> 2, car 26 -> 13, train 31 -> 16
    got = masks(0)
    assert got[1, [7, 8, 11, 26, 31]].tolist() == [0, 1, 2, 13, 16] and got[0, :2].tolist() == [17, 18]
    assert (got[1, [0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30]] == 255).all()
    with pytest.raises(UserError, match="Cityscapes has 19 classes of its own; segment.classes is 21"):
        read_masks(opened(f"cityscapes:{tmp_path}?split=train", tmp_path), 21)


def test_joined_sets_are_their_rows_in_order_and_refuse_what_does_not_join(tmp_path):
    one, two = write_vocseg(tmp_path / "one"), write_vocseg(tmp_path / "two")
    source = f"vocseg:{one}?split=train+aug+vocseg:{two}?split=train"
    manifest = opened(source, tmp_path)
    paths = [manifest.path(row).decode() for row in range(len(manifest))]
    assert paths == [f"{root}/JPEGImages/{name}.jpg" for root, name in zip([one] * 3 + [two] * 2, "bacba", strict=True)]
    assert read_masks(manifest, 21).files[3] == two / "SegmentationClass/b.png"
    with pytest.raises(UserError, match="is in two of them"):
        opened(f"vocseg:{one}?split=train+vocseg:{one}?split=train", tmp_path)


def test_classes_have_names_where_their_source_has_and_vocs_colours():
    voc, city = names_of("vocseg:r?split=train+vocseg:r?split=aug", 21), names_of("cityscapes:r?split=train", 19)
    assert (len(voc), voc[0], voc[15]) == (21, "background", "person")
    assert (len(city), city[0], city[11], city[13], city[18]) == (19, "road", "person", "car", "bicycle")
    assert names_of("pairs:a,b", 2) == names_of("vocseg:r?split=train", 2) == ["class 0", "class 1"]
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 15: (192, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192)}
    assert {label: tuple(PALETTE[label].tolist()) for label in known} == known
