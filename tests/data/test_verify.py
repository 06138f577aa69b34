"""Damage that decodes without a word: libjpeg's warnings find it, and sound images never raise one."""

import io
import json
import os
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from conftest import draw, write_folder
from fastrot.data import verify as verifying
from fastrot.data.images import decode_upright
from fastrot.data.index import index
from fastrot.data.manifest import Manifest
from fastrot.data.verify import damage_of, verify
from fastrot.errors import UserError


def plain(items, total, title):
    return items


def encode(image: Image.Image, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", **options)
    return out.getvalue()


PICTURE = draw(120, 160)
SOUND = {
    "baseline 4:2:0": encode(PICTURE),
    "4:4:4": encode(PICTURE, subsampling=0),
    "4:2:2": encode(PICTURE, subsampling=1),
    "progressive": encode(PICTURE, progressive=True),
    "restart markers": encode(PICTURE, restart_marker_blocks=3),
    "grayscale": encode(PICTURE.convert("L")),
    "CMYK": encode(PICTURE.convert("CMYK")),
    "RGB kept": encode(PICTURE, keep_rgb=True),
    "ICC profile": encode(PICTURE, icc_profile=bytes(150_000)),
    "broken EXIF": encode(PICTURE, exif=b"Exif\0\0" + b"junk" * 30),
    "1x1": encode(draw(1, 1)),
    "1x5000": encode(draw(5000, 1)),
    "bytes after EOI": encode(PICTURE) + b"junk" * 100,
    "another image after EOI": encode(PICTURE) * 2,
    "fill bytes before a marker": b"\xff\xd8\xff\xff\xff" + encode(PICTURE)[2:],
    "JFIF of a revision to come": encode(PICTURE).replace(b"JFIF\0\x01", b"JFIF\0\x03", 1),
}


def scan_of(data: bytes) -> int:
    """Where the first scan's entropy-coded bytes begin."""
    at = data.index(b"\xff\xda") + 2
    return at + int.from_bytes(data[at : at + 2], "big")


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_image_raises_no_warning(name):
    decode_upright(SOUND[name])
    assert damage_of(SOUND[name]) == ""


def test_real_photographs_raise_no_warning(shared_data):
    paths = sorted(shared_data("imagenet_sample").rglob("*.*"))
    assert len(paths) == 379
    assert not [path for path in paths if damage_of(np.fromfile(path, np.uint8))]


@given(st.sampled_from(["baseline 4:2:0", "4:4:4", "grayscale", "CMYK", "restart markers"]), st.floats(0.01, 0.99))
@settings(max_examples=60, deadline=None)
def test_a_cut_file_with_an_end_marker_glued_on_is_found(name, share):
    data = SOUND[name]
    start = scan_of(data)
    cut = data[: start + int((len(data) - 2 - start) * share)].rstrip(b"\xff") + b"\xff\xd9"
    decode_upright(cut)  # Pillow says nothing
    assert damage_of(cut)


def test_a_progressive_file_cut_within_a_scan_is_found():
    """One cut between two scans is a whole file of fewer scans: nobody can tell."""
    data = SOUND["progressive"]
    scans = [at for at in range(len(data) - 1) if data[at : at + 2] == b"\xff\xda"]
    long = [(start, end) for start, end in pairwise([*scans, len(data)]) if end - start > 64]
    assert len(long) > 5
    for start, end in long:
        cut = data[: (start + end) // 2].rstrip(b"\xff") + b"\xff\xd9"
        decode_upright(cut)
        assert damage_of(cut)


def test_most_corrupt_entropy_coded_data_is_found():
    """256 bytes of noise in the middle of the scan; what keeps in step cannot be seen by any decoder."""
    rng, found = np.random.default_rng(0), 0
    for seed in range(40):
        data = bytearray(encode(draw(200, 240, seed), quality=95))
        middle = (scan_of(data) + len(data)) // 2
        data[middle : middle + 256] = rng.integers(0, 255, 256, np.uint8).tobytes()
        decode_upright(bytes(data))
        found += damage_of(bytes(data)).startswith("Corrupt JPEG data")
    assert found > 20


def test_verifying_quarantines_and_remakes_the_content(tmp_path):
    root = write_folder(tmp_path / "d")
    path = root / "class1/2.jpg"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3] + b"\xff\xd9")
    folder = index(str(root), tmp_path / "cache", 10**8, plain)
    before = Manifest.load(folder)
    assert len(before) == 12
    ((place, reason),) = verify(folder, plain)
    assert place == str(path) and "premature end of data" in reason
    after = Manifest.load(index(str(root), tmp_path / "cache", 10**8, plain))  # from the cache
    assert after.quarantined == [[place, reason]]
    assert verify(folder, plain) == []
    path.unlink()
    without = Manifest.load(index(str(root), tmp_path / "cache", 10**8, plain))
    assert after.content == without.content != before.content
    assert [after.name(r) for r in range(11)] == [without.name(r) for r in range(11)]


def test_a_verification_that_ended_early_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})  # parts of one row
    root = write_folder(tmp_path / "d")
    path = root / "class0/1.jpg"
    path.write_bytes(path.read_bytes()[:-200] + b"\xff\xd9")
    folder = index(str(root), tmp_path / "cache", 10**8, plain)

    def until_a_part_is_there(items, total, title):
        for item in items:
            yield item
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(folder, until_a_part_is_there)
    done = len(list(folder.glob("verify-*/*.npz")))
    looked, look = [], verifying._look

    def spy(*words):
        looked.append(words[-1])
        return look(*words)

    monkeypatch.setattr(verifying, "_look", spy)
    ((place, _),) = verify(folder, plain)
    assert place == str(path)
    assert done and len(looked) == 12 - done  # a row a part, of so few
    assert not list(folder.glob("verify-*"))


def test_a_source_of_damage_alone_is_one_line_and_stays_as_it_was(tmp_path):
    root = write_folder(tmp_path / "d", classes=1, per_class=2)
    for path in root.rglob("*.jpg"):
        path.write_bytes(path.read_bytes()[:-200] + b"\xff\xd9")
    folder = index(str(root), tmp_path / "cache", 10**8, plain)
    meta = json.loads((folder / "meta.json").read_text())
    with pytest.raises(UserError, match="^[^\n]*none of its 2 images is sound; the first: [^\n]*0.jpg: Corrupt"):
        verify(folder, plain)
    assert json.loads((folder / "meta.json").read_text()) == meta
