"""The drawn data set: a pure function of (seed, index), written as a whole or not at all."""

import json

import pytest
from PIL import Image

from fastrot.demo.scenes import CLASSES, draw, write
from fastrot.errors import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes") / "set"
    write(root, 2 * len(CLASSES), len(CLASSES), seed=3)
    return root


def test_same_seed_and_index_draw_the_same_bytes():
    first, again = draw(5, 7), draw(5, 7)
    assert first[1] == again[1]
    assert first[0].size == again[0].size and first[0].tobytes() == again[0].tobytes()


def test_another_seed_or_index_draws_another_image():
    assert len({draw(i, s)[0].tobytes() for i, s in ((5, 7), (5, 8), (6, 7))}) == 3


def test_every_class_occurs_and_sizes_vary():
    images, names = zip(*(draw(i, 0) for i in range(2 * len(CLASSES))), strict=True)
    assert set(names) == set(CLASSES)
    assert len({image.size for image in images}) > len(CLASSES)
    assert all(image.mode == "RGB" and 96 <= min(image.size) <= max(image.size) <= 240 for image in images)


def test_write_gives_readable_jpegs_with_distinct_indices(root):
    seen = {}
    for split in ("train", "val"):
        files = sorted((root / split).rglob("*.jpg"))
        assert {f.parent.name for f in files} == set(CLASSES)
        for file in files:
            with Image.open(file) as image:
                image.load()
                assert image.format == "JPEG"
        seen[split] = {f.stem for f in files}
    assert len(seen["train"]) == 2 * len(CLASSES) and len(seen["val"]) == len(CLASSES)
    assert not seen["train"] & seen["val"]
    assert json.loads((root / "scenes.json").read_text())["seed"] == 3
    assert [p.name for p in root.parent.iterdir()] == ["set"], "the temporary folder is gone"


def test_a_complete_folder_is_left_alone(root):
    def snapshot():
        return {p: p.stat().st_mtime_ns for p in root.rglob("*")}

    before = snapshot()
    write(root, 2 * len(CLASSES), len(CLASSES), seed=3)
    assert snapshot() == before


def test_other_parameters_are_refused_and_change_nothing(root):
    with pytest.raises(UserError, match="other scenes"):
        write(root, 2 * len(CLASSES), len(CLASSES), seed=4)
    assert json.loads((root / "scenes.json").read_text())["seed"] == 3


def test_wrong_inputs_are_user_errors(tmp_path):
    n = len(CLASSES)
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("keep me")
    for folder, train, val, seed in (
        ("file", n, n, 0),
        ("full", n, n, 0),
        ("new", n - 1, n, 0),
        ("new", n, n - 1, 0),
        ("new", n, n, -1),
    ):
        with pytest.raises(UserError):
            write(tmp_path / folder, train, val, seed)
    assert (tmp_path / "full" / "thesis.txt").read_text() == "keep me"
    assert not (tmp_path / "new").exists()


def test_the_command_reports_one_line_and_exits_with_2(fastrot, tmp_path):
    (tmp_path / "file").write_text("x")
    done = fastrot("demo-data", "--out", tmp_path / "file")
    assert done.code == 2 and done.err.count("\n") == 1 and len(done.errors) == 1
