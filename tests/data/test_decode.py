"""What all decoders keep to; every kind of image through each of them: test_faults.py."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import draw, runnable_decoders
from fastrot.data.augment import central_boxes, crop_windows
from fastrot.data.decode import make_decoder
from fastrot.data.faults import decode_upright
from fastrot.data.manifest import Manifest, index
from fastrot.data.storage import FileStorage

DECODERS = runnable_decoders()
CPU = torch.device("cpu")


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


@pytest.fixture(scope="module", params=DECODERS)
def decoder(request):
    made, _ = make_decoder(request.param, "cpu", CPU, 2, 64, 2)
    yield made
    made.close()


def run(decoder, buffers, windows, size):
    decoder.submit(list(buffers), np.asarray(windows), size)
    return decoder.result()


def test_a_batch_keeps_its_order_and_its_good_images(decoder):
    whole = np.array([(0, 0, 61, 83)] * 5, np.int32)
    good = [KINDS["baseline"], KINDS["png"], KINDS["gray"], KINDS["gif"], KINDS["progressive"]]
    want, _ = run(decoder, good, whole, 40)
    broken = list(good)
    broken[1], broken[4] = KINDS["png"][:60], np.frombuffer(b"no image" * 9, np.uint8).copy()
    decoder.submit(broken, whole, 40)
    decoder.submit(good, whole, 40)
    pixels, bad = decoder.result()
    assert set(bad) == {1, 4}
    assert torch.equal(pixels[[0, 2, 3]], want[[0, 2, 3]])
    after, none = decoder.result()
    assert not none and torch.equal(after, want)


def test_one_image_alone_is_the_image_in_its_batch(decoder):
    windows = np.array([(3, 5, 40, 50), (0, 0, 61, 83)], np.int32)
    pixels, _ = run(decoder, [KINDS["baseline"], KINDS["444"]], windows, 24)
    assert torch.equal(decoder.one(KINDS["444"], windows[1:], 24), pixels[1])


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


# Levels of 255 from the torch decoder: (mean over an image, share of images equal bit for bit).
AGREEMENT = {"dali": (2, 0), "turbo": (0.5, 0.95), "turbo_fast": (5, 0.9)}


@pytest.mark.parametrize("name", AGREEMENT)
def test_decoders_agree_on_real_photographs(name, shared_data, tmp_path):
    """The same windows of every photograph, the odd files included."""
    folder = index(str(shared_data("imagenet_sample")), tmp_path, 178_000_000, lambda items, total, title: items)
    manifest = Manifest.load(folder)
    rows = np.arange(len(manifest))
    windows = crop_windows(0, rows, np.zeros(len(rows), np.int64), manifest.height[rows], manifest.width[rows])
    buffers = FileStorage(manifest).read(rows)
    results = []
    for each in ("torch", name):
        decoder, _ = make_decoder(each, "cpu", CPU, 2, 64, 2)
        parts = [run(decoder, buffers[a : a + 64], windows[a : a + 64], 224) for a in range(0, len(rows), 64)]
        decoder.close()
        assert not any(bad for _, bad in parts)
        results.append(torch.cat([pixels for pixels, _ in parts]).float())
    difference = (results[0] - results[1]).abs().mean(dim=(1, 2, 3))
    equal = (difference == 0).float().mean()
    print(
        f"{name} against torch on {len(rows)} images: mean {difference.mean():.3f}, worst image "
        f"{difference.max():.3f}, {equal:.1%} equal bit for bit"
    )
    most, least_equal = AGREEMENT[name]
    assert difference.max() < most and equal >= least_equal
