"""Answers carried out on small folders; oracles: Pillow's decoder and turns, and the files as they were."""

import errno
import io
import os
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageOps
from places import NEEDS_TURBOJPEG, answer, jpeg, make, photograph, state, with_tag

from corpus import encode
from fastrot.errors import UserError
from fastrot.orient import coefficients, journal
from fastrot.orient.turning import apply

pytestmark = NEEDS_TURBOJPEG
CLOCKWISE = {90: Image.Transpose.ROTATE_270, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_90}
FILES = {
    "a/one.jpg": jpeg(1),
    "a/two.jpg": jpeg(2, 6),
    "b/three.jpg": jpeg(3),
    "b/four.png": encode(photograph(4), "PNG"),
}
ANSWERS = [
    answer("a/one.jpg", 90),
    answer("a/two.jpg", 180, exif=6),
    answer("b/three.jpg", 0),
    answer("b/four.png", 270, decided=False),
]


def shown(data):
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data)))


def raw(data):
    """Of stored pixels, by Pillow."""
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.fixture
def folder(tmp_path):
    return make(tmp_path / "photos", FILES)


def test_a_copy_is_upright_and_the_source_is_not_touched(folder, tmp_path):
    before = state(folder)
    done = apply(ANSWERS, folder, f"copy:{tmp_path}/out")
    after = state(tmp_path / "out")
    assert state(folder) == before and sorted(after) == sorted(FILES)
    assert done.counts == {"turned": 2, "copied": 2} and not done.left
    assert {name: one[1:] for name, one in after.items()} == {name: one[1:] for name, one in before.items()}
    assert [after[name] == before[name] for name in FILES] == [False, False, True, True]
    for said in ANSWERS[:2]:
        new = (tmp_path / "out" / said.file).read_bytes()
        upright = shown(FILES[said.file]).transpose(CLOCKWISE[said.clockwise])
        assert Image.open(io.BytesIO(new)).getexif().get(0x0112, 1) == 1
        assert (
            np.abs(np.asarray(shown(new), int) - np.asarray(upright, int)).max() <= 3
        )  # chroma's filter, not its data


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("clockwise", CLOCKWISE)
def test_a_tag_is_composed_with_the_answer(tmp_path, orientation, clockwise):
    folder = make(tmp_path / "photos", {"x.jpg": (data := jpeg(1, orientation))})
    done = apply([answer("x.jpg", clockwise, exif=orientation)], folder, "exif", in_place=True)
    new = (folder / "x.jpg").read_bytes()
    assert done.counts == {"tagged": 1}
    assert np.array_equal(raw(new), raw(data))
    assert np.array_equal(shown(new), shown(data).transpose(CLOCKWISE[clockwise]))


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"subsampling": 1}], ids=str)
def test_coefficients_turned_and_turned_back_are_those_that_were(orientation, options):
    """The way there and back gives the same image bit for bit; the way there is Pillow's turn, but for chroma's filter."""
    data = encode(photograph(1, 48, 32), **options)
    new = coefficients.turned(data, orientation, trim=False)
    back = coefficients.turned(new, {6: 8, 8: 6}.get(orientation, orientation), trim=False)
    assert np.array_equal(raw(back), raw(data))
    wanted = ImageOps.exif_transpose(tagged_as(Image.open(io.BytesIO(data)), orientation))
    gray, other = (np.asarray(image.convert("L"), int) for image in (Image.open(io.BytesIO(new)), wanted))
    assert gray.shape == other.shape and np.abs(gray - other).max() <= 3
    assert Image.open(io.BytesIO(new)).info.get("progressive") == Image.open(io.BytesIO(data)).info.get("progressive")


def tagged_as(image, orientation):
    image.load()
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.info["exif"] = exif.tobytes()
    return image


def test_all_that_a_jpeg_says_of_itself_is_kept():
    said = {"icc_profile": b"a profile " * 9000, "comment": b"a comment", "xmp": b"<x/>", "dpi": (300, 150)}
    data = encode(photograph(1), **said) + b"a film behind its end"
    new = coefficients.turned(data, 6, trim=False)
    before, after = (Image.open(io.BytesIO(one)).info for one in (data, new))
    assert after == before and after["icc_profile"] == said["icc_profile"] and new.endswith(b"a film behind its end")


@pytest.mark.parametrize(
    ("clockwise", "says", "box"),
    [
        (90, "10 pixels of its left edge", (10, 0, 42, 50)),
        (270, "2 pixels of its top edge", (0, 2, 42, 50)),
        (180, "2 pixels of its left edge and 10 pixels of its top edge", (2, 10, 50, 42)),
    ],
)
def test_what_is_no_whole_block_is_named_and_left_or_trimmed(tmp_path, clockwise, says, box):
    folder = make(tmp_path / "photos", {"x.jpg": (data := jpeg(1, width=50, height=42))})
    before = state(folder)
    done = apply([answer("x.jpg", clockwise)], folder, "lossless", in_place=True)
    assert done.counts == {"left": 1} and says in done.left["x.jpg"] and state(folder) == before
    done = apply([answer("x.jpg", clockwise)], folder, "lossless", in_place=True, trim=True)
    new = Image.open(io.BytesIO((folder / "x.jpg").read_bytes()))
    assert done.counts == {"turned": 1}
    wanted = Image.open(io.BytesIO(data)).transpose(CLOCKWISE[clockwise]).crop(box)
    assert np.abs(np.asarray(new, int) - np.asarray(wanted, int)).max() <= 3 or new.size == wanted.size
    assert np.abs(np.asarray(new, int) - np.asarray(wanted, int)).mean() < 1


def test_a_copy_that_cannot_be_turned_has_its_tag_set(tmp_path):
    folder = make(
        tmp_path / "photos", {"x.jpg": (data := jpeg(1, width=50, height=42)), "x.webp": encode(photograph(1), "WEBP")}
    )
    done = apply([answer("x.jpg", 90), answer("x.webp", 90)], folder, f"copy:{tmp_path}/out")
    assert done.counts == {"tagged": 1, "left": 1} and "trimmed" in done.left["x.jpg"] and "loss" in done.left["x.webp"]
    new = (tmp_path / "out" / "x.jpg").read_bytes()
    assert np.array_equal(shown(new), shown(data).transpose(CLOCKWISE[90]))
    assert (tmp_path / "out" / "x.webp").read_bytes() == (folder / "x.webp").read_bytes()


def kinds():
    picture = photograph(1)
    palette = picture.quantize(11)
    clear = picture.convert("RGBA")
    clear.putalpha(picture.convert("L"))
    exact = {"lossless": True, "exact": True}
    yield from (
        ("RGB.png", picture, {}),
        ("clear.png", clear, {}),
        ("palette.png", palette, {}),
        ("gray.png", picture.convert("L"), {}),
    )
    yield "deep.png", Image.fromarray(np.asarray(picture.convert("L"), np.uint16) * 257 + 3), {}
    yield from (("one.png", picture.convert("1"), {}), ("RGB.webp", picture, exact), ("clear.webp", clear, exact))
    yield from (("RGB.tiff", picture, {"compression": "tiff_lzw"}), ("CMYK.tiff", picture.convert("CMYK"), {}))
    yield from (("RGB.bmp", picture, {}), ("palette.gif", palette, {}), ("palette.bmp", palette, {}))


@pytest.mark.parametrize(("name", "picture", "options"), list(kinds()), ids=[name for name, *_ in kinds()])
def test_other_kinds_are_written_again_with_the_same_pixels(tmp_path, name, picture, options):
    kind = {"tiff": "TIFF", "webp": "WEBP", "bmp": "BMP", "gif": "GIF", "png": "PNG"}[name.split(".")[1]]
    tagged = kind in ("PNG", "WEBP", "TIFF")
    said = {"icc_profile": b"a profile"} if tagged else {}
    folder = make(
        tmp_path / "photos",
        {name: (data := encode(picture, kind, **options, **said, **with_tag(7 if tagged else None)))},
    )
    done = apply([answer(name, 90)], folder, "lossless", in_place=True)
    new = (folder / name).read_bytes()
    assert done.counts == {"turned": 1}, done.left
    before, after = shown(data), Image.open(io.BytesIO(new))
    assert after.mode == before.mode and after.getexif().get(0x0112, 1) == 1
    wanted, got = (
        image.convert("RGBA") if image.mode == "P" else image for image in (before.transpose(CLOCKWISE[90]), after)
    )
    assert np.array_equal(got, wanted) and after.info.get("icc_profile") == before.info.get("icc_profile")


def test_a_png_keeps_its_words(tmp_path):
    from PIL.PngImagePlugin import PngInfo

    words = PngInfo()
    words.add_text("Title", "a picture")
    words.add_itxt("Author", "é", zip=True)
    data = encode(photograph(1), "PNG", pnginfo=words, dpi=(200, 200))
    folder = make(tmp_path / "photos", {"x.png": data})
    apply([answer("x.png", 180)], folder, "lossless", in_place=True)
    before, after = (Image.open(io.BytesIO(one)).info for one in (data, (folder / "x.png").read_bytes()))
    assert after == before and after["Author"] == "é"


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        (
            "film.gif",
            encode(photograph(1).quantize(8), "GIF", save_all=True, append_images=[photograph(2).quantize(8)]),
            "several",
        ),
        ("lossy.webp", encode(photograph(1), "WEBP"), "with loss"),
        ("lossy.tif", encode(photograph(1), "TIFF", compression="jpeg"), "without loss"),
        ("odd.tif", encode(photograph(1), "TIFF", tiffinfo={50000: "mine"}), "tag 50000"),
        ("x.ppm", encode(photograph(1), "PPM"), "of a kind"),
        ("cut.jpg", jpeg(1)[:-40], "libjpeg-turbo"),
        ("not.jpg", b"\xff\xd8\xff nothing", "not an image"),
    ],
)
def test_what_would_lose_something_is_left_with_a_word(tmp_path, name, data, says):
    folder = make(tmp_path / "photos", {name: data})
    done = apply([answer(name, 90)], folder, "lossless", in_place=True)
    assert done.counts == {"left": 1} and says in done.left[name] and (folder / name).read_bytes() == data


def test_pixels_that_lie_well_under_a_wrong_tag_are_not_moved(tmp_path):
    folder = make(tmp_path / "photos", {"x.jpg": (data := jpeg(1, 6))})
    assert apply([answer("x.jpg", 270, exif=6)], folder, "lossless", in_place=True).counts == {"turned": 1}
    new = (folder / "x.jpg").read_bytes()
    assert len(new) == len(data) and sum(a != b for a, b in zip(new, data, strict=True)) == 1


def test_the_same_command_again_does_nothing(folder, tmp_path):
    for how, in_place in ((f"copy:{tmp_path}/out", False), ("lossless", True)):
        apply(ANSWERS, folder, how, in_place)
        before = state(tmp_path)
        again = apply(ANSWERS, folder, how, in_place)
        assert again.counts["done"] == (4 if how != "lossless" else 2) and state(tmp_path) == before


def refused(says, *args, **options):
    with pytest.raises(UserError, match=says) as caught:
        apply(*args, **options)
    assert "\n" not in str(caught.value)


def test_words_that_do_not_go_together(folder, tmp_path):
    refused("add --in-place", ANSWERS, folder, "exif")
    refused("leave --in-place out", ANSWERS, folder, f"copy:{tmp_path}/out", in_place=True)
    refused("expected copy:DIR", ANSWERS, folder, "turn")
    refused("expected copy:DIR", ANSWERS, folder, "copy:")
    refused("must lie outside", ANSWERS, folder, f"copy:{folder}/out")
    refused("must lie outside", ANSWERS, folder, f"copy:{tmp_path}")
    refused("no such folder", ANSWERS, tmp_path / "none", "exif", in_place=True)
    refused("cannot lie in the folder", ANSWERS, folder, "exif", in_place=True, journal=folder / "j.jsonl")
    assert sorted(os.listdir(tmp_path)) == ["photos"]


def test_answers_that_do_not_fit_the_folder(folder, tmp_path):
    before = state(folder)
    exif = {"in_place": True}
    refused("two answers", [*ANSWERS, answer("a/../a/one.jpg", 0)], folder, f"copy:{tmp_path}/out")
    refused("lies outside", [answer(str(tmp_path / "x.jpg"), 90)], folder, "exif", **exif)
    refused("lies outside", [answer("../x.jpg", 90)], folder, "exif", **exif)
    refused("is gone", [*ANSWERS, answer("a/gone.jpg", 90)], folder, "exif", **exif)
    refused("is gone", [answer("a/one.jpg/member", 90)], folder, "exif", **exif)
    refused("no image file of its own", [answer("a", 90)], folder, "exif", **exif)
    refused("EXIF tag has changed", [replace(ANSWERS[1], exif=3)], folder, "exif", **exif)
    assert state(folder) == before


def test_a_file_that_changes_while_it_is_turned_stays_as_it_is(folder, monkeypatch):
    def meanwhile(data, orientation, trim, turned=coefficients.turned):
        (folder / "a/one.jpg").write_bytes(b"another program's")
        return turned(data, orientation, trim)

    monkeypatch.setattr(coefficients, "turned", meanwhile)
    refused("changed while", ANSWERS, folder, "lossless", in_place=True)
    assert (folder / "a/one.jpg").read_bytes() == b"another program's"


def test_a_file_that_has_changed_since_it_was_turned(folder):
    apply(ANSWERS, folder, "lossless", in_place=True)
    (folder / "a/one.jpg").write_bytes(jpeg(9))
    refused("changed since it was turned", ANSWERS, folder, "lossless", in_place=True)


def test_names_that_are_there_already(folder, tmp_path):
    make(tmp_path / "out", {"b/three.jpg": b"mine"})
    refused("is there already", ANSWERS, folder, f"copy:{tmp_path}/out")
    assert (tmp_path / "out/b/three.jpg").read_bytes() == b"mine"


def test_a_link_is_left(folder, tmp_path):
    (folder / "link.jpg").symlink_to(make(tmp_path / "else", {"x.jpg": jpeg(5)}) / "x.jpg")
    done = apply([answer("link.jpg", 90)], folder, "exif", in_place=True)
    assert "link" in done.left["link.jpg"] and (folder / "link.jpg").is_symlink()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("call", ["fsync", "link", "rename"])
def test_a_disk_that_is_full_or_read_only(folder, monkeypatch, number, call):
    """Whatever fails: one line, the files as they were or as they become, and the same command goes on."""
    before, calls = state(folder), iter(range(100))

    real = getattr(os, call)

    def fails(*args, **options):
        if next(calls) >= (7 if call == "fsync" else 1):
            raise OSError(number, os.strerror(number), args[0])
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(journal.os, call, fails)
        if call == "link":
            patch.setattr(journal.shutil, "copy2", fails)
        if call == "rename":
            patch.setattr(journal.os, "replace", fails)
        refused(os.strerror(number), ANSWERS, folder, "lossless", in_place=True)
    for name, one in state(folder).items():
        assert one == before[name] or name == "a/one.jpg"
    assert apply(ANSWERS, folder, "lossless", in_place=True).counts["left"] == 0
    journal.undo(folder.parent / "photos.orient-journal.jsonl")
    assert state(folder) == before


def test_without_the_library_one_line_says_what_to_install(folder, monkeypatch):
    coefficients._library.cache_clear()
    monkeypatch.setattr(coefficients.ctypes.util, "find_library", lambda name: "libnone.so.0")
    refused("apt-get install libturbojpeg0", ANSWERS, folder, "lossless", in_place=True)
    monkeypatch.undo()
    coefficients._library.cache_clear()
