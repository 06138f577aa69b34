"""The fault table, through every decoder; `pytest -s` prints it as a matrix."""

import numpy as np
import pytest
from PIL import Image

from conftest import DALI_RESIZES, cpu_decoder, draw, runnable_decoders
from corpus import BROKEN, FAULTS, SILENT, SOUND, encode
from fastrot.data.decode.batch import Batch
from fastrot.data.images import decode_upright
from fastrot.data.manifest import Manifest, index
from fastrot.data.storage import FileStorage
from fastrot.data.verify import verify

DECODERS = [*runnable_decoders(), DALI_RESIZES]
SIZE = 32
# Mean levels of 255 from Pillow's crop and resize, of smooth pictures. ffcv averages areas, and picks
# samples where one side shrinks and the other grows.
MOST = {"ffcv": 6.0}


def plain(items, total, title):
    return items


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    """{fault: (manifest folder, row of the fault or its reason)}: each in a folder with one sound image."""
    found = {}
    for number, (fault, data) in enumerate(FAULTS.items()):
        root = tmp_path_factory.mktemp(f"fault{number}")
        (root / "a").mkdir()
        (root / "a" / "fault.jpg").write_bytes(data)  # whatever it is: the name may lie
        (root / "a" / "sound.jpg").write_bytes(encode(draw(50, 40)))
        folder = index(str(root), root / "cache", 178_000_000, plain)
        manifest = Manifest.load(folder)
        reasons = [reason for place, reason in manifest.quarantined if "fault.jpg" in place]
        found[fault] = folder, reasons[0] if reasons else 0
    return found


@pytest.fixture(scope="module", params=DECODERS)
def decoder(request):
    made = cpu_decoder(request.param)
    made.key = request.param
    yield made
    made.close()


@pytest.fixture(scope="module")
def matrix():
    """Cells by fault and decoder, printed when all are there."""
    cells: dict[tuple[str, str], str] = {}
    yield cells
    width = max(map(len, FAULTS))
    print("\n" + "fault".ljust(width), *(name.ljust(24) for name in DECODERS), sep="  ")
    for fault in FAULTS:
        print(fault.ljust(width), *(cells.get((fault, name), "").ljust(24) for name in DECODERS), sep="  ")


def windows_of(manifest: Manifest) -> np.ndarray:
    """The whole image, its upper left and its lower right."""
    height, width = int(manifest.height[0]), int(manifest.width[0])
    h, w = max(1, height // 2), max(1, width // 2)
    return np.array([(0, 0, height, width), (0, 0, h, w), (height - h, width - w, h, w)], np.int32)


def shown(decoder, manifest: Manifest, windows: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
    (buffer,) = FileStorage(manifest).read(np.array([0]))
    decoder.submit(Batch([buffer] * len(windows), manifest.orientation[[0] * len(windows)], windows, SIZE))
    pixels, bad = decoder.result()
    return pixels.numpy(), bad


def pillow(manifest: Manifest, window) -> np.ndarray:
    top, left, height, width = map(int, window)
    (buffer,) = FileStorage(manifest).read(np.array([0]))
    crop = decode_upright(buffer).crop((left, top, left + width, top + height))
    return np.asarray(crop.resize((SIZE, SIZE), Image.Resampling.BILINEAR), float)


@pytest.mark.parametrize("fault", SOUND)
def test_an_odd_image_shows_pillows_pixels(fault, indexed, decoder, matrix):
    folder, row = indexed[fault]
    assert row == 0, row
    manifest = Manifest.load(folder)
    windows = windows_of(manifest)
    pixels, bad = shown(decoder, manifest, windows)
    assert not bad
    errors = [np.abs(pixels[at] - pillow(manifest, window)).mean() for at, window in enumerate(windows)]
    matrix[fault, decoder.key] = f"same pixels ({max(errors):.2f})"
    assert max(errors) < MOST.get(decoder.key, 2.0)


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_image_is_quarantined_or_replaced(fault, indexed, decoder, matrix):
    """At indexing; or, where decoding alone shows it, while running: whole, and in its damaged part."""
    folder, row = indexed[fault]
    if isinstance(row, str):
        matrix[fault, decoder.key] = "quarantined by index"
        return
    manifest = Manifest.load(folder)
    _, bad = shown(decoder, manifest, windows_of(manifest))
    matrix[fault, decoder.key] = "replaced while running"
    assert set(bad) == {0, 1, 2}


@pytest.mark.parametrize("fault", SILENT)
def test_silent_damage_is_found_by_verify_and_breaks_no_decoder(fault, indexed, decoder, matrix):
    folder, row = indexed[fault]
    assert row == 0, row
    manifest = Manifest.load(folder)
    windows = windows_of(manifest)
    pixels, bad = shown(decoder, manifest, windows)
    errors = [np.abs(pixels[at] - pillow(manifest, w)).mean() for at, w in enumerate(windows) if at not in bad]
    assert not errors or max(errors) < MOST.get(decoder.key, 2.0)
    matrix[fault, decoder.key] = "found by index --verify"
    assert [reason for place, reason in verify(folder, plain) + manifest.quarantined if "fault.jpg" in place]


def test_no_cell_of_the_matrix_is_empty(matrix):
    assert set(matrix) == {(fault, name) for fault in FAULTS for name in DECODERS}
