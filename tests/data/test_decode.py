"""What all decoders keep to; every kind of image through each of them: test_faults.py."""

import contextlib
import ctypes
import functools
import io
import re
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from conftest import DALI_RESIZES, cpu_decoder, draw, runnable_decoders
from fastrot import config as configs
from fastrot.data import build
from fastrot.data.augment import central_boxes, crop_windows
from fastrot.data.decode import make_decoder, nvjpeg
from fastrot.data.decode.batch import Batch
from fastrot.data.images import decode_upright
from fastrot.data.index import index
from fastrot.data.loader_settings import Tuned
from fastrot.data.manifest import Manifest
from fastrot.data.storage import FileStorage
from fastrot.distributed import Ranks
from fastrot.errors import BadImage, Fault, UserError
from fastrot_kernels.build import BuildError

DECODERS = [*runnable_decoders(), DALI_RESIZES]
MIXED, ITSELF = "dali, mixed", "nvimgcodec, on a GPU"
_NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
ON_GPU = [pytest.param(name, marks=_NEEDS_GPU) for name in (MIXED, ITSELF)]


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> np.ndarray:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return np.frombuffer(out.getvalue(), np.uint8).copy()


KINDS = {
    "baseline": encoded(draw(61, 83), quality=90),
    "444": encoded(draw(61, 83), quality=90, subsampling=0),
    "progressive": encoded(draw(61, 83), quality=90, progressive=True),
    "gray": encoded(draw(61, 83).convert("L"), quality=90),
    "png": encoded(draw(61, 83), "PNG"),
    "gif": encoded(draw(61, 83).quantize(64), "GIF"),
}


def made(name):
    if name == "ffcv":
        pytest.importorskip("fastrot.data.decode.ffcv", reason="FFCV is not installed", exc_type=ImportError)
    if name == MIXED:
        dali = pytest.importorskip("fastrot.data.decode.dali", reason="DALI is not installed", exc_type=ImportError)
        return dali.DaliDecoder(0, 2, 64, 2)
    if name == ITSELF:
        return make_decoder("nvimgcodec", "gpu", torch.device("cuda", 0), 2, 64, 2)[0]
    return cpu_decoder(name)


@pytest.fixture(scope="module", params=DECODERS)
def decoder(request):
    decoder = made(request.param)
    yield decoder
    decoder.close()


def batch_of(buffers, windows, size, orientations=None) -> Batch:
    buffers = list(buffers)
    upright = np.ones(len(buffers), np.uint8)
    return Batch(buffers, upright if orientations is None else orientations, np.asarray(windows), size)


def run(decoder, buffers, windows, size, orientations=None):
    decoder.submit(batch_of(buffers, windows, size, orientations))
    return decoder.result()


def test_a_batch_keeps_its_order_and_its_good_images(decoder):
    whole = np.array([(0, 0, 61, 83)] * 5, np.int32)
    good = [KINDS["baseline"], KINDS["png"], KINDS["gray"], KINDS["gif"], KINDS["progressive"]]
    want, _ = run(decoder, good, whole, 40)
    broken = list(good)
    broken[1], broken[4] = KINDS["png"][:60], np.frombuffer(b"no image" * 9, np.uint8).copy()
    decoder.submit(batch_of(broken, whole, 40))
    decoder.submit(batch_of(good, whole, 40))
    pixels, bad = decoder.result()
    assert set(bad) == {1, 4}
    assert torch.equal(pixels[[0, 2, 3]], want[[0, 2, 3]])
    after, none = decoder.result()
    assert not none and torch.equal(after, want)


def test_one_image_alone_is_the_image_in_its_batch(decoder):
    windows = np.array([(3, 5, 40, 50), (0, 0, 61, 83)], np.int32)
    pixels, _ = run(decoder, [KINDS["baseline"], KINDS["444"]], windows, 24)
    assert torch.equal(decoder.one(batch_of([KINDS["444"]], windows[1:], 24)), pixels[1])


def test_evaluation_boxes_show_pillows_resize_of_a_box(decoder):
    buffer = encoded(draw(120, 170), quality=95)
    box = central_boxes(np.array([120]), np.array([170]), 73, 64)
    pixels, bad = run(decoder, [buffer], box, 64)
    top, left, height, width = box[0]
    want = decode_upright(buffer).resize((64, 64), Image.Resampling.BILINEAR, (left, top, left + width, top + height))
    assert not bad
    assert np.abs(pixels[0].numpy().astype(float) - np.asarray(want, float)).mean() < 0.5


def test_an_image_of_another_size_than_indexed_is_bad_not_shifted(decoder):
    _, bad = run(decoder, [KINDS["baseline"]], np.array([(0, 0, 500, 500)], np.int32), 16)
    assert list(bad) == [0]


# Levels of 255 from the torch decoder: (mean over the worst image, mean over all, share of images equal bit for bit).
AGREEMENT = {
    "dali": (0.25, 0.002, 0.99),
    DALI_RESIZES: (0.25, 0.2, 0),
    MIXED: (2, 0.25, 0),
    ITSELF: (2, 0.25, 0),
    "nvimgcodec": (0.25, 0.002, 0.99),
    "ffcv": (6.6, 1.8, 0),
    "turbo": (0.25, 0.002, 0.99),
    "turbo_fast": (4, 0.07, 0.94),
}


@pytest.fixture(scope="module")
def photographs(shared_data, tmp_path_factory):
    """A function that decodes a window of every photograph, the odd files included, by a decoder's name: float32."""
    source, cache = str(shared_data("imagenet_sample")), tmp_path_factory.mktemp("photographs")
    manifest = Manifest.load(index(source, cache, 178_000_000, lambda items, *_: items))
    rows = np.arange(len(manifest))
    windows = crop_windows(0, rows, np.zeros(len(rows), np.int64), manifest.height[rows], manifest.width[rows])
    buffers = FileStorage(manifest).read(rows)

    @functools.cache
    def decoded(name: str) -> torch.Tensor:
        decoder, some = made(name), [slice(at, at + 64) for at in range(0, len(rows), 64)]
        parts = [run(decoder, buffers[s], windows[s], 224, manifest.orientation[s]) for s in some]
        decoder.close()
        assert not any(bad for _, bad in parts)
        return torch.cat([pixels.cpu() for pixels, _ in parts]).float()

    return decoded


@pytest.mark.parametrize("name", [*(name for name in AGREEMENT if name not in (MIXED, ITSELF)), *ON_GPU])
def test_decoders_agree_on_real_photographs(name, photographs):
    difference = (photographs("torch") - photographs(name)).abs().mean(dim=(1, 2, 3))
    equal = (difference == 0).float().mean()
    print(
        f"{name} against torch on {len(difference)} images: mean {difference.mean():.3f}, worst image "
        f"{difference.max():.3f}, {equal:.1%} equal bit for bit"
    )
    worst, mean, least_equal = AGREEMENT[name]
    assert difference.max() < worst and difference.mean() < mean and equal >= least_equal


@pytest.mark.parametrize("name", [*DECODERS, *ON_GPU])
@pytest.mark.parametrize("boxed", [False, True])
def test_a_window_is_of_the_upright_image_whatever_its_orientation(name, boxed):
    """As the batch says: the bytes say 6, each, and no decoder reads it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = encoded(draw(61, 83), quality=95, subsampling=0, exif=exif)
    windows = np.array([(3, 5, 40, 50)] * 8, np.float64 if boxed else np.int32)
    orientations = np.arange(1, 9, dtype=np.uint8)
    decoder = made(name)
    pixels, bad = run(decoder, [buffer] * 8, windows, 24, orientations)
    alone = [decoder.one(batch_of([buffer], windows[:1], 24, orientations[at : at + 1])) for at in range(8)]
    decoder.close()
    assert not bad
    for at, orientation in enumerate(orientations.tolist()):
        crop = decode_upright(buffer, orientation).crop((5, 3, 55, 43))
        want = np.asarray(crop.resize((24, 24), Image.Resampling.BILINEAR), float)
        assert np.abs(pixels[at].cpu().numpy() - want).mean() < 2
        assert torch.equal(alone[at], pixels[at])


@pytest.mark.parametrize(
    "spoil",
    {
        "empty": lambda b: b[:0],
        "garbage": lambda b: np.frombuffer(b"\xff\xd8\xff" + bytes(range(256)) * 9, np.uint8).copy(),
        "two bytes": lambda b: b[:2],
        "header only": lambda b: b[: bytes(b).index(b"\xff\xda")],
        "header and scan header": lambda b: b[: bytes(b).index(b"\xff\xda") + 12],
        "cut at half": lambda b: b[: len(b) // 2],
        "cut at 99%": lambda b: b[: len(b) * 99 // 100],
    }.items(),
    ids=lambda item: item[0],
)
def test_a_damaged_jpeg_is_bad_and_the_next_one_good(decoder, spoil):
    good = encoded(draw(120, 160), quality=90)
    window = np.array([(60, 80, 60, 80)], np.int32)  # below every cut
    _, bad = run(decoder, [spoil[1](good)], window, 32)
    assert list(bad) == [0] and bad[0]
    assert not run(decoder, [good], window, 32)[1]


def test_dali_resizes_where_turbo_cannot_be_compiled_and_says_so(monkeypatch, caplog):
    def fails(threads):
        raise BuildError("no compiler")

    monkeypatch.setattr("fastrot.data.decode.dali.Turbo", fails)
    decoder, line = make_decoder("dali", "cpu", torch.device("cpu"), 2, 64, 2)
    pixels, bad = run(decoder, [KINDS["baseline"]], np.array([(0, 0, 61, 83)], np.int32), 40)
    decoder.close()
    assert line == "decoding with dali on the CPU, 2 threads"
    assert "turbo cannot be built (no compiler): DALI resizes" in caplog.text
    assert not bad and pixels.shape == (1, 40, 40, 3)


@pytest.fixture
def no_gpu_pipeline(monkeypatch):
    """DALI, whose pipelines can be built on the CPU alone, and of those `left[0]`."""
    dali = pytest.importorskip("fastrot.data.decode.dali", reason="DALI is not installed", exc_type=ImportError)
    build, left = dali._windows, [0]

    def windows(place, *arguments, **options):
        if place == "mixed" or not left[0]:
            raise RuntimeError("nvJPEG is not there")
        left[0] -= 1
        return build(place, *arguments, **options)

    monkeypatch.setattr(dali, "_windows", windows)
    monkeypatch.setattr("torch.cuda.Stream", lambda device: None)
    return left


def test_auto_steps_over_a_dali_that_cannot_build_its_pipeline_and_says_so(no_gpu_pipeline, monkeypatch):
    gpu, why = torch.device("cuda", 0), r"data.decode dali: dali on GPU 0 \(mixed\): .* \(nvJPEG is not there\)"
    with pytest.raises(UserError, match=why):
        make_decoder("dali", "auto", gpu, 2, 64, 2)
    with pytest.raises(UserError, match=why):
        make_decoder("auto", "gpu", gpu, 2, 64, 2)
    monkeypatch.setattr("fastrot.data.decode._ON_CPU", ["dali", "torch"])
    decoder, line = make_decoder("auto", "auto", gpu, 2, 64, 2)
    assert decoder.name == "torch on the CPU" and re.search(f"auto: {why}.*; .*dali on the CPU", line)
    decoder.close()
    no_gpu_pipeline[0] = 1
    decoder, line = make_decoder("auto", "auto", gpu, 2, 64, 2)
    assert decoder.name.startswith("dali on the CPU") and re.search(f"auto: {why}", line)
    decoder.close()


def test_a_pipeline_that_cannot_be_built_again_ends_the_run(no_gpu_pipeline):
    """No image is bad for it."""
    no_gpu_pipeline[0] = 1
    decoder, window = make_decoder("dali", "cpu", torch.device("cpu"), 2, 64, 2)[0], np.array([(0, 0, 61, 83)])
    with pytest.raises(Fault, match="its pipeline cannot be built"):
        run(decoder, [KINDS["baseline"][: len(KINDS["baseline"]) // 2]], window.astype(np.int32), 40)
    decoder.close()


@pytest.mark.parametrize("found, filtered", [((13, 3), True), ((13, 2), True), ((13, 1), False), ((12, 4), False)])
def test_an_nvjpeg_that_sends_windows_to_the_cpu_is_not_asked_to_filter_them(monkeypatch, caplog, found, filtered):
    dali = pytest.importorskip("fastrot.data.decode.dali", reason="DALI is not installed", exc_type=ImportError)
    loaded = []

    class Library:
        def __init__(self, path, mode):
            loaded.append((path, mode))

        def nvjpegGetProperty(self, kind, value):
            value._obj.value = found[kind]

    monkeypatch.setattr("ctypes.CDLL", Library)
    dali.nvjpeg.filters_windows.cache_clear()
    hardware = dali.nvjpeg.Hardware(0.5, 400, 600)
    assert dali._on_gpu("mixed", hardware, whole=False) == hardware.options() | {"jpeg_fancy_upsampling": filtered}
    assert dali._on_gpu("mixed", hardware, whole=True) == hardware.options() | {"jpeg_fancy_upsampling": True}
    assert ("nvJPEG 1" in caplog.text) is not filtered and len(loaded) == 1
    dali.nvjpeg.filters_windows.cache_clear()


def test_the_hardware_decoder_takes_nearly_all_and_knows_how_large_they_are():
    """Up to a size for which memory is there."""
    assert nvjpeg.Hardware().options()["hw_decoder_load"] == 0.99
    assert nvjpeg.Hardware(0.25, 400, 90_000).options() == {
        "hw_decoder_load": 0.25,
        "preallocate_height_hint": 400,
        "preallocate_width_hint": 5980,
    }


def test_the_hardware_decoder_is_told_of_the_manifests_largest_image(images, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(build, "make_decoder", lambda *words: told.append(words[-1]))
    config, _ = configs.load(None, [f"data.train={images}"])
    manifest = Manifest.load(index(str(images), tmp_path, 178_000_000, lambda items, *_: items))
    alone = Ranks(0, 1, 0, 1, torch.device("cpu"))
    build.decoder_of(config, manifest, alone, 4, Tuned(1, 2, 0.25, ""))
    widths, heights = zip(
        *(decode_upright(np.fromfile(path, np.uint8)).size for path in images.rglob("*.jpg")), strict=True
    )
    assert told == [nvjpeg.Hardware(0.25, max(heights), max(widths))] and max(heights) != max(widths)


def test_the_wheels_nvjpeg_is_the_one_that_is_loaded(monkeypatch):
    """Whichever a library path would find; a library without a wheel is found by its name."""
    path = nvjpeg._path()
    if path == "libnvjpeg.so.13":
        pytest.skip("the nvJPEG wheel is not installed")
    assert Path(path).is_file() and Path(path).name == "libnvjpeg.so.13"
    wheels = tuple(map(int, metadata.version("nvidia-nvjpeg").split(".")[:2]))
    assert nvjpeg.version(ctypes.CDLL(path)) == wheels and nvjpeg.filters_windows()

    def none(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(nvjpeg, "files", none)
    assert nvjpeg._path() == "libnvjpeg.so.13"


@pytest.mark.parametrize("name", DECODERS)
def test_pixels_stay_when_later_batches_come_and_the_decoder_goes(name):
    decoder = made(name)
    window = np.array([(0, 0, 61, 83)], np.int32)
    first, _ = run(decoder, [KINDS["baseline"]], window, 40)
    kept = first.clone()
    for _ in range(6):
        run(decoder, [KINDS["444"]], window, 40)
    decoder.close()
    del decoder
    assert torch.equal(first, kept)


@pytest.mark.parametrize("error", [torch.AcceleratorError, torch.OutOfMemoryError])
@pytest.mark.parametrize("where", ["_feed", "_collect"])
def test_what_fails_on_the_device_is_no_bad_image(monkeypatch, error, where):
    """Both are RuntimeErrors, which DALI raises for an image."""
    decoder, window = cpu_decoder(DALI_RESIZES), np.array([(0, 0, 61, 83)], np.int32)

    def fails(*arguments):
        raise error("the device's own")

    monkeypatch.setattr(type(decoder), where, fails)
    alone = batch_of([KINDS["444"]], window, 40)
    for work in (lambda: run(decoder, [KINDS["baseline"]], window, 40), lambda: decoder.one(alone)):
        with pytest.raises(error, match="the device's own"):
            work()
    decoder.close()


def test_ffcv_keeps_no_large_images_memory(monkeypatch):
    ffcv = pytest.importorskip("fastrot.data.decode.ffcv", reason="FFCV is not installed", exc_type=ImportError)
    monkeypatch.setattr(ffcv, "_scratch", SimpleNamespace())
    monkeypatch.setattr(ffcv, "_SCRATCH", 61 * 83 * 3)
    decoder, window = ffcv.FfcvDecoder(1), np.array([(0, 0, 61, 83)], np.int32)
    want = {}
    for side in (61, 62):  # the most that is kept, and more
        buffer = encoded(draw(side, 83), quality=90)
        want[side] = decoder.one(batch_of([buffer], window, 24))
        assert len(ffcv._scratch.pixels) == 61 * 83 * 3
    decoder.close()
    assert all(pixels.float().mean() > 10 for pixels in want.values())


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_bytes_crash_ffcv(data):
    """Each is an image or a BadImage, whatever a JPEG's bytes turn into."""
    decoder = made("ffcv")
    whole = KINDS[data.draw(st.sampled_from(["baseline", "progressive", "gray", "444"]))].copy()
    for at in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=5)):
        whole[at] = data.draw(st.integers(0, 255))
    part = whole[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else whole
    with contextlib.suppress(BadImage):
        assert decoder.one(batch_of([part], np.array([[0, 0, 9, 9]], np.int32), 16)).shape == (16, 16, 3)
    decoder.close()
