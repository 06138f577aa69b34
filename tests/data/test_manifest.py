"""What becomes a row, what is left out and told, and what the hashes notice."""

import errno
import hashlib
import io
import os
import shutil
import struct

import numpy as np
import pytest
from PIL import Image

from conftest import draw, write_folder
from fastrot.data.images import decode_upright
from fastrot.data.index import index, scan_file
from fastrot.data.manifest import Manifest
from fastrot.data.storage import FileStorage
from fastrot.errors import BadImage, UserError


def build(source, cache, max_pixels=10**8):
    return Manifest.load(index(str(source), cache, max_pixels, lambda items, total, title: items))


def jpeg(image: Image.Image, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", **options)
    return out.getvalue()


def test_rows_are_classes_by_name_then_files_by_path_as_bytes(tmp_path):
    for name in ("b/2.JPG", "b/10.jpeg", "a/sub/x.png", "a/z.jpg", "a/\u00e9 '\n.jpg"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(20, 30).save(path, "PNG" if name.endswith("png") else "JPEG")
    for ignored in ("a/.hidden.jpg", "a/notes.txt", "outside.jpg"):
        (tmp_path / "data" / ignored).write_bytes(b"x")
    (tmp_path / "data/a/broken.jpg").symlink_to("nowhere")
    (tmp_path / "data/a/loop").symlink_to("..")
    (tmp_path / "data/c").mkdir()
    manifest = build(tmp_path / "data", tmp_path / "cache")
    names = [os.path.relpath(manifest.path(r), os.fsencode(tmp_path / "data")) for r in range(len(manifest))]
    a = sorted(n.encode() for n in ("a/sub/x.png", "a/z.jpg", "a/\u00e9 '\n.jpg"))
    assert [n for n in names if n.startswith(b"a/") and b"loop" not in n] == a
    assert [n for n in names if n.startswith(b"b/")] == [b"b/10.jpeg", b"b/2.JPG"]
    assert manifest.classes == ["a", "b", "c"]
    assert manifest.label[names.index(b"b/2.JPG")] == 1
    assert manifest.skipped["broken link"] == 1
    assert manifest.skipped["other extension"] == 1
    assert manifest.skipped["outside a class folder"] == 1
    assert manifest.skipped["empty class folder"] == 1


def test_names_of_any_bytes_folders_named_as_images_and_links_are_read(tmp_path):
    root = os.fsencode(tmp_path / "d")
    names = [b"with space.jpg", b"qu\"ote's.jpg", b"new\nline.jpg", b"not-utf8-\xff\xfe.JPEG", b"folder.jpg/inside.jpg"]
    for name in names:
        os.makedirs(os.path.dirname(os.path.join(root, b"c\xff", name)), exist_ok=True)
        with open(os.path.join(root, b"c\xff", name), "wb") as file:
            file.write(jpeg(draw(20, 30)))
    os.symlink(os.path.join(root, b"c\xff", names[0]), os.path.join(root, b"c\xff", b"z-link.jpg"))
    os.makedirs(tmp_path / "elsewhere")
    draw(20, 30).save(tmp_path / "elsewhere/one.jpg")
    os.symlink(tmp_path / "elsewhere", os.path.join(root, b"d"))
    with open(os.path.join(root, b"c\xff", b"bad-\xff.jpg"), "wb") as file:
        file.write(b"junk")
    manifest = build(tmp_path / "d", tmp_path / "cache")
    found = [os.path.relpath(manifest.path(row), root) for row in range(len(manifest))]
    assert found == [*sorted(b"c\xff/" + name for name in [*names, b"z-link.jpg"]), b"d/one.jpg"]
    assert all(isinstance(buffer, np.ndarray) for buffer in FileStorage(manifest).read(np.arange(len(manifest))))
    ((place, _),) = manifest.quarantined
    assert place.encode().endswith(b"/bad-\\udcff.jpg")


def test_a_folder_that_may_not_be_listed_is_one_line(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "d")
    scandir = os.scandir

    def refuse(folder):  # root may list anything, so the refusal is made here
        if os.fsencode(folder).endswith(b"class1"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=f"^{root}: cannot list {root}/class1 \\(Permission denied\\)$"):
        build(root, tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="^[^\n]*cannot be written[^\n]*; set FASTROT_CACHE to a folder that can$"):
        build(write_folder(tmp_path / "d"), tmp_path / "file")


@pytest.mark.parametrize(
    "change, words",
    [
        (os.remove, "cannot be opened"),
        (lambda path: os.truncate(path, 10), "changed: 10 bytes"),
        (lambda path: os.truncate(path, 10**6), "changed: 1000000 bytes"),
    ],
)
def test_a_file_gone_shrunk_or_grown_after_indexing_is_a_bad_image(tmp_path, change, words):
    manifest = build(write_folder(tmp_path / "d"), tmp_path / "cache")
    change(manifest.path(5))
    good, bad = FileStorage(manifest).read(np.array([4, 5]))
    assert isinstance(good, np.ndarray)
    assert isinstance(bad, BadImage) and words in str(bad)


def test_sizes_are_those_of_the_upright_image(tmp_path):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        (tmp_path / "d/c").mkdir(parents=True, exist_ok=True)
        draw(40, 60).save(tmp_path / f"d/c/{orientation}.jpg", exif=exif)
    manifest = build(tmp_path / "d", tmp_path / "cache")
    for row in range(8):
        upright = decode_upright(np.fromfile(os.fsdecode(manifest.path(row)), np.uint8))
        assert (manifest.width[row], manifest.height[row]) == upright.size


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda b: b"", "empty file"),
        (lambda b: b"garbage" * 50, "not an image"),
        (lambda b: b[:30], "header"),
        (lambda b: b[: len(b) // 2], "is truncated (its end marker is missing)"),
        (lambda b: b[:-2], "is truncated (its end marker is missing)"),
    ],
)
def test_unsound_files_are_quarantined_with_their_reason(tmp_path, damage, reason):
    root = write_folder(tmp_path / "d", classes=1, per_class=3)
    (root / "class0/1.jpg").write_bytes(damage(jpeg(draw(256, 256))))
    manifest = build(root, tmp_path / "cache")
    assert len(manifest) == 2
    ((path, why),) = manifest.quarantined
    assert path.endswith("class0/1.jpg")
    assert reason in why


def test_a_decompression_bomb_is_refused_from_its_header(tmp_path):
    root = write_folder(tmp_path / "d", classes=1, per_class=2)
    data = bytearray(jpeg(draw(8, 8)))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = (60000).to_bytes(2, "big") * 2
    (root / "class0/bomb.jpg").write_bytes(data)
    assert "above data.max_pixels" in scan_file(os.fsencode(root / "class0/bomb.jpg"), 0, -1, (0, 0), 178_000_000)
    assert len(build(root, tmp_path / "cache")) == 2


def test_the_kind_is_read_from_the_bytes_not_the_name(tmp_path):
    (tmp_path / "d/c").mkdir(parents=True)
    draw(20, 20).save(tmp_path / "d/c/png.jpg", "PNG")
    manifest = build(tmp_path / "d", tmp_path / "cache")
    from fastrot.data.images import KINDS

    assert KINDS[manifest.kind[0]] == "PNG"


def test_content_is_the_images_and_storage_is_where_they_lie(tmp_path):
    first = build(write_folder(tmp_path / "one"), tmp_path / "cache")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    moved = build(tmp_path / "two", tmp_path / "cache")
    assert moved.content == first.content
    assert moved.storage != first.storage
    draw(48, 48, 99).save(tmp_path / "two/class1/2.jpg")
    assert build(tmp_path / "two", tmp_path / "cache").content != first.content


def bmp(width: int, height: int, value: int) -> bytes:
    """A BMP written by hand: the same bytes on every machine."""
    row = (bytes([value, value + 1, value + 2]) * width).ljust((3 * width + 3) // 4 * 4, b"\0")
    size = 54 + len(row) * height
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, size - 54, 2835, 2835, 0, 0)
    return b"BM" + struct.pack("<IHHI", size, 0, 0, 54) + header + row * height


def test_the_content_hash_has_its_golden_value(tmp_path):
    """Every checkpoint holds this hash: it may never change."""
    for number, (label, width, height) in enumerate((("a", 3, 2), ("a", 5, 7), ("b", 64, 40))):
        (tmp_path / "d" / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / label / f"{number}.bmp").write_bytes(bmp(width, height, 10 * number))
    manifest = build(tmp_path / "d", tmp_path / "cache")
    assert manifest.content == "49b955ed32adf27d1b9a9f6eaa681e9ad9577aae3d28d17b8efda975f1db80b0"
    want = hashlib.sha256()
    for number, (label, width, height) in enumerate(((0, 3, 2), (0, 5, 7), (1, 64, 40))):
        data = bmp(width, height, 10 * number)
        want.update(struct.pack("<4q", height, width, label, len(data)) + hashlib.sha256(data[:4096]).digest())
    assert manifest.content == want.hexdigest()


def test_an_unchanged_source_comes_from_the_cache(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "d")
    first = build(root, tmp_path / "cache")
    monkeypatch.setattr("fastrot.data.index.scan_file", None)
    assert build(root, tmp_path / "cache").content == first.content


def test_a_damaged_cache_is_made_anew(tmp_path):
    root = write_folder(tmp_path / "d")
    folder = index(str(root), tmp_path / "cache", 10**8, lambda items, total, title: items)
    (folder / "height.npy").write_bytes(b"junk")
    assert len(build(root, tmp_path / "cache")) == 12


def test_a_file_list_keeps_its_order_and_labels(tmp_path):
    root = write_folder(tmp_path / "d")
    (tmp_path / "d/all.txt").write_text("class2/0.jpg\t7\nclass0/1.jpg\n\nclass1/3.jpg\t-1\n")
    manifest = build(f"list:{tmp_path / 'd/all.txt'}", tmp_path / "cache")
    assert [os.fsdecode(manifest.path(r)) for r in range(3)] == [
        str(root / n) for n in ("class2/0.jpg", "class0/1.jpg", "class1/3.jpg")
    ]
    assert manifest.label.tolist() == [7, -1, -1]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_list_may_name_classes_which_count_by_their_names(tmp_path, mark):
    write_folder(tmp_path / "d", classes=1)
    lines = "d/class0/0.jpg\tzebra\r\nd/class0/1.jpg\t\u00e9tang\r\nd/class0/2.jpg\r\nd/class0/3.jpg\t ant eater \r\n"
    (tmp_path / "l.txt").write_bytes(mark + lines.encode())
    manifest = build(f"list:{tmp_path / 'l.txt'}", tmp_path / "cache")
    assert manifest.classes == ["ant eater", "zebra", "\u00e9tang"]
    assert manifest.label.tolist() == [1, 2, -1, 0]


def test_integers_of_a_list_stay_as_they_are_with_a_byte_order_mark_too(tmp_path):
    write_folder(tmp_path / "d", classes=1)
    (tmp_path / "l.txt").write_bytes(b"\xef\xbb\xbfd/class0/0.jpg\t007\nd/class0/1.jpg\t-1\nd/class0/2.jpg\t5\n")
    manifest = build(f"list:{tmp_path / 'l.txt'}", tmp_path / "cache")
    assert manifest.label.tolist() == [7, -1, 5] and manifest.classes == []


def test_images_are_all_that_lie_below_a_folder_without_labels(tmp_path):
    for name in ("top.jpg", "a/one.jpg", "a/deep/two.png", "b/.hidden.jpg", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        draw(20, 30).save(tmp_path / name, "PNG")
    (tmp_path / "a" / "loop").symlink_to("..")
    manifest = build(f"images:{tmp_path}", tmp_path / ".cache")
    names = [os.path.relpath(os.fsdecode(manifest.path(row)), tmp_path) for row in range(len(manifest))]
    assert names == ["a/deep/two.png", "a/one.jpg", "top.jpg"] and set(manifest.label) == {-1}
    assert manifest.skipped == {"hidden": 1, "other extension": 1, "folder seen before (link)": 1}


def test_a_folder_of_images_alone_is_a_source_without_labels(tmp_path):
    for name in ("b.jpg", "a.PNG", "c.jpeg", ".hidden.jpg", "empty/notes.txt"):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        draw(20, 30).save(tmp_path / "d" / name, "JPEG")
    (tmp_path / "d/readme.txt").write_text("x")
    (tmp_path / "d/self.jpg").symlink_to("self.jpg")
    manifest = build(tmp_path / "d", tmp_path / "cache")
    assert [os.path.basename(manifest.path(row)) for row in range(3)] == [b"a.PNG", b"b.jpg", b"c.jpeg"]
    assert manifest.label.tolist() == [-1] * 3 and manifest.classes == []
    assert manifest.skipped == {"hidden": 1, "empty class folder": 1, "other extension": 2, "broken link": 1}


def test_a_link_to_itself_and_a_pipe_are_passed_over(tmp_path):
    root = write_folder(tmp_path / "d", classes=1)
    (root / "class0/self.jpg").symlink_to("self.jpg")
    os.mkfifo(root / "class0/pipe.jpg")
    (root / "class0/link.jpg").symlink_to("pipe.jpg")
    manifest = build(root, tmp_path / "cache")
    assert len(manifest) == 4 and manifest.skipped == {"broken link": 1, "not a file": 2}


@pytest.mark.parametrize("most, rows", [(20 * 30, 1), (20 * 30 - 1, 0)])
def test_an_image_of_just_max_pixels_is_a_row(tmp_path, most, rows):
    (tmp_path / "d/c").mkdir(parents=True)
    draw(20, 30).save(tmp_path / "d/c/a.jpg")
    draw(2, 3).save(tmp_path / "d/c/b.jpg")
    assert len(build(tmp_path / "d", tmp_path / "cache", most)) == 1 + rows


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda p: str(p / "none"), "no such folder"),
        (lambda p: (p / "empty").mkdir() or str(p / "empty"), "holds no image"),
        (lambda p: (p / "file").write_text("x") and str(p / "file"), "is a file"),
        (lambda p: (p / "text").mkdir() or ((p / "text/a.txt").write_text("x") and str(p / "text")), "holds no image"),
        (lambda p: f"list:{p / 'none.txt'}", "No such file"),
        (lambda p: (p / "l.txt").write_text("gone.jpg\t1\n") and f"list:{p / 'l.txt'}", "line 1: no such file"),
        (lambda p: (p / "e.txt").write_text("\n") and f"list:{p / 'e.txt'}", "is empty"),
        (
            lambda p: (p / "b.txt").write_text("b.txt\t\nb.txt\tcat\nb.txt\t7\n") and f"list:{p / 'b.txt'}",
            "label 'cat' in line 2 is a name, '7' in line 3 is an integer; write all labels in one way",
        ),
        (
            lambda p: (p / "l.txt").write_text("l.txt\t" + "9" * 20) and f"list:{p / 'l.txt'}",
            "is more than 64 bits hold",
        ),
        (
            lambda p: (p / "u.txt").write_text("u.txt\t1", "utf-16") and f"list:{p / 'u.txt'}",
            "UTF-16 text; save it as UTF-8",
        ),
        (lambda p: (p / "z.txt").write_bytes(b"a\0b.jpg") and f"list:{p / 'z.txt'}", "line 1: holds a zero byte"),
        (
            lambda p: [(p / "bad/c").mkdir(parents=True), (p / "bad/c/a.jpg").write_bytes(b"x")] and str(p / "bad"),
            "none of its 1 files is a sound image",
        ),
    ],
)
def test_a_source_with_nothing_to_read_is_one_line(tmp_path, make, words):
    with pytest.raises(UserError, match="^[^\n]*$") as error:
        build(make(tmp_path), tmp_path / "cache")
    assert words in str(error.value)
