"""`fastrot pack`: any source as one FFCV file that plain FFCV reads."""

import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from conftest import draw, write_folder
from fastrot.data import beton
from fastrot.data import pack as packing
from fastrot.data.encode import Encoding
from fastrot.data.images import decode_upright
from fastrot.data.index import index
from fastrot.data.manifest import Manifest
from fastrot.data.storage import FileStorage
from fastrot.errors import UserError


def build(source, cache):
    return Manifest.load(index(str(source), cache, 10**8, lambda items, total, title: items))


@pytest.fixture
def odd(tmp_path):
    """A folder with one image of each kind that cannot be kept as it is, among JPEGs that can."""
    folder = write_folder(tmp_path / "odd", classes=2, per_class=2)
    exif = Image.Exif()
    exif[0x0112] = 6
    draw(40, 70, 8).save(folder / "class0" / "turned.jpg", exif=exif)
    draw(41, 60, 9).convert("CMYK").save(folder / "class0" / "cmyk.jpg")
    draw(42, 60, 10).save(folder / "class1" / "b.png")
    draw(43, 60, 11).convert("L").save(folder / "class1" / "gray.jpg")
    draw(44, 60, 12).save(folder / "class1" / "progressive.jpg", progressive=True)
    return folder


def test_kept_bytes_are_the_folders_and_give_its_stream(fastrot, tmp_path):
    folder = write_folder(tmp_path / "d")
    packed = fastrot("pack", folder, tmp_path / "d.beton", "--json").json
    assert packed["rows"] == packed["kept"] == 12 and packed["left_out"] == []
    assert build(tmp_path / "d.beton", tmp_path / "c").content == packed["content"]
    hashes = set()
    for source in (folder, tmp_path / "d.beton"):
        for ranks in (1, 3):
            words = [f"data.train={source}", "data.crop=32", "data.decode=torch", "--json", "--ranks", ranks]
            done = fastrot("stream", "--pixels", "optim.images_per_step=8", *words).json
            hashes.add((done["sha256"], done["pixels_sha256"]))
    assert len(hashes) == 1


def test_what_cannot_be_kept_is_upright_jpeg_in_the_same_order(fastrot, tmp_path, odd):
    packed = fastrot("pack", odd, tmp_path / "o.beton", "--quality", 95, "--json").json
    assert (packed["kept"], packed["encoded"]) == (6, 3)
    before, after = build(odd, tmp_path / "c"), build(tmp_path / "o.beton", tmp_path / "c")
    assert after.label.tolist() == before.label.tolist()
    assert after.height.tolist() == before.height.tolist() and after.width.tolist() == before.width.tolist()
    rows = np.arange(len(before))
    for was, now in zip(FileStorage(before).read(rows), FileStorage(after).read(rows), strict=True):
        difference = np.asarray(decode_upright(was), float) - np.asarray(decode_upright(now), float)
        assert np.abs(difference).mean() < 2


def test_raw_rows_are_the_upright_pixels(fastrot, tmp_path, odd):
    packed = fastrot("pack", odd, tmp_path / "o.beton", "--mode", "raw", "--json").json
    assert packed["raw"] == packed["rows"] == 9
    before, after = build(odd, tmp_path / "c"), build(tmp_path / "o.beton", tmp_path / "c")
    rows = np.arange(len(before))
    for was, now in zip(FileStorage(before).read(rows), FileStorage(after).read(rows), strict=True):
        assert np.array_equal(np.asarray(decode_upright(was)), now)


def test_a_mix_is_spread_evenly_and_sides_are_bounded(fastrot, tmp_path):
    folder = write_folder(tmp_path / "d")
    words = ["--mode", "mix", "--raw-share", 0.25, "--max-side", 50, "--json"]
    packed = fastrot("pack", folder, tmp_path / "m.beton", *words).json
    assert packed["raw"] == 3 and packed["kept"] + packed["encoded"] == 9
    table = beton.read_table(tmp_path / "m.beton")
    assert table.mode.tolist() == [0, 0, 0, 1] * 3
    assert np.maximum(table.height, table.width).max() == 50


def test_a_packed_file_can_be_packed_and_verified(fastrot, tmp_path):
    folder = write_folder(tmp_path / "d")
    fastrot("pack", folder, tmp_path / "r.beton", "--mode", "raw")
    again = fastrot("pack", tmp_path / "r.beton", tmp_path / "j.beton", "--json").json
    assert again["encoded"] == 12
    assert fastrot("index", tmp_path / "r.beton", "--verify", "--json").json["verified"] == []
    at = int(beton.read_table(tmp_path / "r.beton").offset[3]) + 500
    with (tmp_path / "r.beton").open("r+b") as file:
        file.seek(at)
        file.write(b"\0\0\xff")
    ((place, reason),) = fastrot("index", tmp_path / "r.beton", "--verify", "--json").json["verified"]
    assert f"r.beton at byte {at - 500}" in place and "CRC-32" in reason


def test_an_image_that_only_decoding_shows_to_be_broken_is_left_out_and_listed(fastrot, tmp_path):
    folder = write_folder(tmp_path / "d", classes=1, per_class=3)
    image = folder / "class0" / "1.jpg"
    whole = image.read_bytes()
    codes = whole.index(b"\xff\xc4") + 5  # no such Huffman code; the header and the end marker are sound
    image.write_bytes(whole[:codes] + b"\xff" * 16 + whole[codes + 16 :])
    packed = fastrot("pack", folder, tmp_path / "d.beton", "--mode", "raw", "--json").json
    ((place, reason),) = packed["left_out"]
    assert place == str(image) and "cannot be decoded" in reason
    want = [str(folder / "class0" / name) for name in ("0.jpg", "2.jpg")]
    table = beton.read_table(tmp_path / "d.beton")
    with (tmp_path / "d.beton").open("rb") as file:
        for offset, length, name in zip(table.offset, table.length, want, strict=True):
            file.seek(offset)
            assert file.read(length) == Image.open(name).convert("RGB").tobytes()
    words = ["--mode", "raw", "data.max_bad=0"]
    assert fastrot("pack", folder, tmp_path / "e.beton", *words).code == 3


def _die(rows):
    os.kill(os.getpid(), signal.SIGKILL)


def _wait(rows):
    signal.pause()


def test_a_worker_that_dies_is_a_fault_and_leaves_no_file(fastrot, tmp_path, images, monkeypatch):
    monkeypatch.setattr(packing, "encode_rows", _die)
    done = fastrot("pack", images, tmp_path / "d.beton")
    assert done.code == 3 and "worker died" in done.errors[0]
    assert not list(tmp_path.glob("*.beton*")) and not list(tmp_path.glob(".*"))


def test_workers_that_hang_are_a_fault(fastrot, tmp_path, images, monkeypatch):
    monkeypatch.setattr(packing, "encode_rows", _wait)
    done = fastrot("pack", images, tmp_path / "d.beton", "data.timeout=3")
    assert done.code == 3 and "data.timeout 3 s" in done.errors[0]
    assert not list(tmp_path.glob(".*"))


def test_ctrl_c_leaves_no_file(fastrot, tmp_path, images, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(packing, "_read_back", interrupted)
    done = fastrot("pack", images, tmp_path / "d.beton")
    assert done.code == 130 and done.errors == ["fastrot: stopped by Ctrl-C"]
    assert not list(tmp_path.iterdir())


def test_a_disk_that_forgets_is_noticed(fastrot, tmp_path, images, monkeypatch):
    real = packing._read_back

    def spoiled(path):
        with path.open("r+b") as file:
            file.seek(int(beton.read_table(path).offset[2]) + 9)
            file.write(b"\0\0\0")
        real(path)

    monkeypatch.setattr(packing, "_read_back", spoiled)
    done = fastrot("pack", images, tmp_path / "d.beton")
    assert done.code == 3 and "sample 2 is not read back" in done.errors[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "out, words, said",
    [
        ("a.tar", [], "ends in .beton"),
        ("none/a.beton", [], "no such folder"),
        ("there.beton", [], "exists; remove it"),
        ("a.beton", ["--quality", "0"], "--quality 0"),
        ("a.beton", ["--raw-share", "2"], "--raw-share 2"),
        ("a.beton", ["--max-side", "0"], "--max-side 0"),
    ],
)
def test_what_cannot_be_packed_so_is_one_line(fastrot, tmp_path, images, out, words, said):
    (tmp_path / "there.beton").touch()
    done = fastrot("pack", images, tmp_path / out, *words)
    assert done.code == 2 and len(done.errors) == 1 and said in done.errors[0]


@pytest.mark.parametrize("mode, os_cache", [("keep", True), ("mix", False)])
def test_plain_ffcv_reads_the_same_rows(fastrot, tmp_path, odd, monkeypatch, mode, os_cache):
    """FFCV's own Loader, whole images at a fixed size, against Pillow on the source."""
    pytest.importorskip("ffcv", reason="FFCV is not installed", exc_type=ImportError)
    from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline.compiler import Compiler

    monkeypatch.setattr(Compiler, "is_enabled", False)  # compiling its pipeline takes longer than all the rest
    fastrot("pack", odd, tmp_path / "o.beton", "--mode", mode)
    manifest = build(odd, tmp_path / "c")
    loader = Loader(
        str(tmp_path / "o.beton"),
        batch_size=3,
        num_workers=1,
        order=OrderOption.SEQUENTIAL,
        os_cache=os_cache,
        pipelines={"image": [CenterCropRGBImageDecoder((32, 32), 1)], "label": [IntDecoder()]},
    )
    batches = [(image.copy(), label.copy()) for image, label in loader]
    assert np.concatenate([label for _, label in batches]).ravel().tolist() == manifest.label.tolist()
    images = np.concatenate([image for image, _ in batches])
    for row, buffer in enumerate(FileStorage(manifest).read(np.arange(len(manifest)))):
        image = decode_upright(buffer)
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        want = image.crop((left, top, left + side, top + side)).resize((32, 32), Image.Resampling.BOX)
        assert np.abs(np.asarray(want, float) - images[row]).mean() < 5  # a JPEG's own loss, and the fast DCT's


def test_files_that_plain_ffcv_wrote_are_read(tmp_path, odd):
    pytest.importorskip("ffcv", reason="FFCV is not installed", exc_type=ImportError)
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    manifest = build(odd, tmp_path / "c")
    buffers = FileStorage(manifest).read(np.arange(len(manifest)))
    samples = [(decode_upright(b), int(label)) for b, label in zip(buffers, manifest.label, strict=True)]
    fields = {"image": RGBImageField("proportion", compress_probability=0.5), "label": IntField()}
    DatasetWriter(str(tmp_path / "f.beton"), fields, num_workers=2).from_indexed_dataset(samples, chunksize=2)
    theirs = build(tmp_path / "f.beton", tmp_path / "c")
    assert theirs.label.tolist() == manifest.label.tolist()
    for buffer, (image, _) in zip(FileStorage(theirs).read(np.arange(len(theirs))), samples, strict=True):
        got = buffer if buffer.ndim == 3 else np.asarray(decode_upright(buffer))
        assert np.abs(got.astype(float) - np.asarray(image, float)).mean() < 4  # JPEG's own loss on tiny images


def test_sides_and_pages_beyond_the_format_are_one_line():
    rows = {"height": np.array([70_000]), "width": np.array([2]), "length": np.array([9]), "kind": np.array([2])}
    long = SimpleNamespace(**rows, name=lambda row: "long.png")
    with pytest.raises(UserError, match=r"^long\.png: a side of 70000 pixels, most is 65500; shrink it: --max-side$"):
        Encoding("raw").largest(long)
    assert Encoding("raw", max_side=100).largest(long) == 3 * 100 + 4096
    with pytest.raises(UserError, match="more than a .beton's page can hold; shrink it: --max-side$"):
        beton.page_for(2**31 + 1)


def test_several_labels_an_image_are_refused_in_one_line(fastrot, tmp_path, images, monkeypatch):
    many = replace(build(images, tmp_path / "c"), label=np.zeros((12, 20), np.int8))
    monkeypatch.setattr(packing.Manifest, "load", lambda folder: many)
    done = fastrot("pack", images, tmp_path / "m.beton")
    assert done.code == 2 and "has several labels an image" in done.errors[0]
