"""FFCV's files: the rows of the folder they were made from, and every way in which one can be wrong."""

import io
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import draw, write_folder
from fastrot.data import beton
from fastrot.data.decode import make_decoder
from fastrot.data.decode.batch import Batch
from fastrot.data.images import KINDS
from fastrot.data.index import index
from fastrot.data.manifest import Manifest
from fastrot.data.storage import FileStorage
from fastrot.errors import BadImage, UserError

PAGE = 1 << 21


def build(source, cache):
    return Manifest.load(index(str(source), cache, 10**8, lambda items, total, title: items))


def jpeg(seed: int = 0) -> bytes:
    out = io.BytesIO()
    draw(30, 40, seed).save(out, "JPEG")
    return out.getvalue()


def pixels(seed: int = 0) -> bytes:
    return draw(30, 40, seed).tobytes()


def write(path, samples=None):
    """A .beton of (bytes, mode, label); three by default: JPEG, raw, JPEG."""
    samples = samples or [(jpeg(0), beton.JPEG, 4), (pixels(1), beton.RAW, 5), (jpeg(2), beton.JPEG, 6)]
    with open(path, "wb") as file:
        writer = beton.Writer(file, len(samples), PAGE)
        for data, mode, label in samples:
            writer.add(data, mode, 30, 40, label)
        writer.finish()
    return path


def test_rows_of_both_modes_are_read_as_they_were_written(tmp_path):
    manifest = build(write(tmp_path / "a.beton"), tmp_path / "cache")
    assert manifest.label.tolist() == [4, 5, 6]
    assert [KINDS[kind] for kind in manifest.kind] == ["JPEG", "RAW", "JPEG"]
    assert manifest.height.tolist() == [30] * 3 and manifest.width.tolist() == [40] * 3
    first, second, third = FileStorage(manifest).read(np.arange(3))
    assert first.tobytes() == jpeg(0) and third.tobytes() == jpeg(2)
    assert second.shape == (30, 40, 3) and second.tobytes() == pixels(1)


def test_a_beton_of_a_folders_bytes_has_its_content(tmp_path):
    folder = build(write_folder(tmp_path / "d"), tmp_path / "cache")
    with open(tmp_path / "d.beton", "wb") as file:
        writer = beton.Writer(file, len(folder), PAGE)
        for row in range(len(folder)):
            with open(folder.path(row), "rb") as image:
                size = int(folder.height[row]), int(folder.width[row])
                writer.add(image.read(), beton.JPEG, *size, int(folder.label[row]))
        writer.finish()
    packed = build(tmp_path / "d.beton", tmp_path / "cache")
    assert packed.content == folder.content
    assert packed.label.tolist() == folder.label.tolist()


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 3 << 20), min_size=1, max_size=8))
def test_no_sample_crosses_a_page_or_touches_another(tmp_path_factory, sizes):
    path = tmp_path_factory.mktemp("pages") / "a.beton"
    page = 1 << 22
    with open(path, "wb") as file:
        writer = beton.Writer(file, len(sizes) + 3, page)
        for at, size in enumerate(sizes):
            writer.add(bytes([at]) * size, beton.JPEG, 1, 1, at)
        writer.finish()
    table = beton.read_table(path)  # which checks the rest
    assert table.length.tolist() == sizes and table.label.tolist() == list(range(len(sizes)))
    whole = path.read_bytes()
    for at, offset in enumerate(table.offset.tolist()):
        assert whole[offset : offset + sizes[at]] == bytes([at]) * sizes[at]
    path.unlink()


HEADER, FIELD, IMAGE = 24, 1041, 13
METADATA = HEADER + 2 * FIELD


def patched(path, at: int, kind: str, value) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(np.array([value], kind).tobytes())


def allocations(path) -> int:
    return int(np.fromfile(path, "<u8", 1, offset=16)[0])


DAMAGE = {
    "empty": (lambda p: p.write_bytes(b""), "0 bytes, too few"),
    "a JPEG": (lambda p: p.write_bytes(jpeg()), "version"),
    "version": (lambda p: patched(p, 0, "<u2", 3), "version 3"),
    "page size": (lambda p: patched(p, 4, "<u4", 4097), "page size 4097"),
    "no sample": (lambda p: patched(p, 8, "<u8", 0), "holds no sample"),
    "many samples": (lambda p: patched(p, 8, "<u8", 2**63), "metadata table would end after"),
    "many fields": (lambda p: patched(p, 2, "<u2", 60000), "list of fields would end after"),
    "cut": (lambda p: p.write_bytes(p.read_bytes()[: PAGE + 50]), "truncated, or never finished"),
    "cut table": (lambda p: p.write_bytes(p.read_bytes()[:-5]), "allocation table is cut"),
    "lost table": (lambda p: p.write_bytes(p.read_bytes()[: allocations(p)]), "allocation table is empty"),
    "no header": (lambda p: patched(p, 16, "<u8", 0), "truncated or damaged"),
    "field type": (lambda p: patched(p, HEADER, "u1", 255), "type of its own (255)"),
    "no image": (lambda p: patched(p, HEADER, "u1", 1), "holds 0 image fields"),
    "float label": (lambda p: patched(p, HEADER + FIELD, "u1", 0), "no int field but label (float)"),
    "array label": (lambda p: patched(p, HEADER + FIELD, "u1", 4), "no int field but label (array)"),
    "pointer": (lambda p: patched(p, METADATA + 5, "<u8", 7), "sample 0 points to byte 7"),
    "two alike": (lambda p: patched(p, METADATA + 24 + 5, "<u8", PAGE), "point to the same bytes"),
    "mode": (lambda p: patched(p, METADATA, "u1", 9), "sample 0 is of mode 9"),
    "width": (lambda p: patched(p, METADATA + 24 + 1, "<u2", 41), "sample 1 has 3600 bytes"),
    "outside": (lambda p: patched(p, allocations(p) + 8, "<u8", 2**64 - 8), "not inside its data"),
    "too long": (lambda p: patched(p, allocations(p) + 16, "<u8", 2**64 - 8), "not inside its data"),
    "overlap": (lambda p: patched(p, allocations(p) + 16, "<u8", 5000), "overlap"),
    "across pages": (lambda p: patched(p, allocations(p) + 8, "<u8", PAGE - 1), "crosses a page"),
    "label value": (lambda p: patched(p, METADATA + 16, "<i8", 99), "do not match their checksum"),
}


def foreign(path):
    """A file as another writer leaves it: no checksums are named, and its last stretch ends where its tables begin."""
    write(path)
    patched(path, HEADER + 17, "S16", b"")
    whole, n = bytearray(path.read_bytes()), 3
    table = whole[-24 * n :]
    del whole[allocations(path) - 4 * n :]
    whole[16:24] = np.array([len(whole)], "<u8").tobytes()
    path.write_bytes(whole + table)
    return path


@pytest.mark.parametrize("more, words", [(0, None), (1, "not inside its data")])
def test_a_stretch_may_end_where_the_tables_begin_and_no_byte_later(tmp_path, more, words):
    path = foreign(tmp_path / "a.beton")
    last = allocations(path) + 2 * 24 + 16
    patched(path, last, "<u8", len(jpeg(2)) + more)
    if words is None:
        table = beton.read_table(path)
        assert int(table.offset[2] + table.length[2]) == allocations(path) and table.checksum is None
        return
    with pytest.raises(UserError, match=words):
        beton.read_table(path)


@pytest.mark.parametrize("back, words", [(0, None), (1, "not inside its data")])
def test_a_stretch_may_begin_where_the_metadata_end_and_no_byte_earlier(tmp_path, back, words):
    path = foreign(tmp_path / "a.beton")
    begin = METADATA + 3 * 24 - back
    for place in (METADATA + 5, allocations(path) + 8):
        patched(path, place, "<u8", begin)
    if words is None:
        assert beton.read_table(path).offset[0] == begin
        return
    with pytest.raises(UserError, match=words):
        beton.read_table(path)


@pytest.mark.parametrize("more", [0, 1])
def test_a_stretch_of_ours_ends_before_its_checksums(tmp_path, more):
    """By one byte too long, with checksums of the tables that hold all the same."""
    path = write(tmp_path / "a.beton")
    patched(path, allocations(path) + 2 * 24 + 16, "<u8", len(jpeg(2)) + more)
    whole = path.read_bytes()
    end = allocations(path)
    tables = whole[METADATA : METADATA + 3 * 24] + whole[end:] + whole[end - 12 : end]
    patched(path, HEADER + 17 + 24, "<u4", zlib.crc32(tables))
    if more:
        with pytest.raises(UserError, match="sample 2 runs into its checksums"):
            beton.read_table(path)
    else:
        assert beton.read_table(path).length[2] == len(jpeg(2))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_one_line_that_says_what_is_wrong(tmp_path, damage):
    path = write(tmp_path / "a.beton")
    spoil, words = DAMAGE[damage]
    spoil(path)
    with pytest.raises(UserError) as error:
        build(path, tmp_path / "cache")
    said = str(error.value)
    assert words in said and said.startswith(str(path)) and "\n" not in said


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"none\.beton: cannot be read \(No such file"):
        build(tmp_path / "none.beton", tmp_path / "cache")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_damage_to_the_tables_is_refused_or_leaves_what_was_written(tmp_path_factory, data):
    """Bytes anywhere in header, descriptors, metadata and allocation table."""
    path = tmp_path_factory.mktemp("fuzz") / "a.beton"
    write(path)
    sound = beton.read_table(path)
    whole = np.fromfile(path, np.uint8)
    places = np.concatenate([np.arange(METADATA + 3 * 24), np.arange(allocations(path) - 12, len(whole))])
    for at in data.draw(st.lists(st.sampled_from(places.tolist()), min_size=1, max_size=6)):
        whole[at] = data.draw(st.integers(0, 255))
    whole.tofile(path)
    try:
        table = beton.read_table(path)
    except UserError:
        return
    finally:
        path.unlink()
    assert (table.offset >= 0).all() and (table.offset + table.length <= len(whole)).all()
    if table.checksum is not None:
        assert table.label.tolist() == sound.label.tolist() or len(table.label) < len(sound.label)


def test_damaged_pixels_are_quarantined_or_found_by_their_checksum(tmp_path):
    path = write(tmp_path / "a.beton", [(jpeg(0), 0, 0), (pixels(1), 1, 0), (jpeg(2), 0, 0)])
    table = beton.read_table(path)
    patched(path, int(table.offset[0]), "<u8", 0)  # the JPEG's first bytes
    patched(path, int(table.offset[1]) + 100, "<u8", 0)
    manifest = build(path, tmp_path / "cache")
    assert [reason for _, reason in manifest.quarantined] == ["not an image that Pillow knows"]
    raw, good = FileStorage(manifest).read(np.arange(2))
    assert not beton.unchanged(manifest.path(0), int(manifest.offset[0]), raw)
    assert beton.unchanged(manifest.path(1), int(manifest.offset[1]), good)


def test_raw_rows_show_the_oracles_pixels_among_others(tmp_path):
    """A batch of JPEG and raw rows against the torch decoder on the same images stored as PNG."""
    rng = np.random.default_rng(0)
    images = [draw(int(rng.integers(40, 90)), int(rng.integers(40, 90)), seed) for seed in range(9)]
    with open(tmp_path / "a.beton", "wb") as file:
        writer = beton.Writer(file, len(images), PAGE)
        for at, image in enumerate(images):
            out = io.BytesIO()
            image.save(out, "PNG")
            data = image.tobytes() if at % 3 else out.getvalue()
            writer.add(data, beton.RAW if at % 3 else beton.JPEG, image.height, image.width, 0)
        writer.finish()
    mixed = build(tmp_path / "a.beton", tmp_path / "cache")
    (tmp_path / "d" / "c").mkdir(parents=True)
    for at, image in enumerate(images):
        image.save(tmp_path / "d" / "c" / f"{at}.png")
    folder = build(tmp_path / "d", tmp_path / "cache")
    windows = np.array([(at, 2 * at, 20 + at, 18 + 2 * at) for at in range(9)], np.int32)
    boxes = windows + np.float64(0.4)
    decoder, _ = make_decoder("torch", "cpu", torch.device("cpu"), 2, 16, 2)
    for crops in (windows, boxes):
        results = []
        for manifest in (mixed, folder):
            decoder.submit(Batch(FileStorage(manifest).read(np.arange(9)), np.ones(9, np.uint8), crops, 32))
            got, bad = decoder.result()
            assert not bad
            results.append(got)
        assert torch.equal(*results)
    (raw,) = FileStorage(mixed).read(np.array([1]))
    assert torch.equal(decoder.one(Batch([raw], np.ones(1, np.uint8), boxes[1:2], 32)), results[0][1])
    with pytest.raises(BadImage, match="not as indexed"):
        decoder.one(Batch([raw], np.ones(1, np.uint8), np.array([[0, 0, 200, 10]], np.int32), 32))
    windows = np.array([[0, 0, 9, 9], [0, 0, 200, 10]], np.int32)
    decoder.submit(Batch([raw, raw], np.ones(2, np.uint8), windows, 32))
    assert list(decoder.result()[1]) == [1]
    decoder.close()
