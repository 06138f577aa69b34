"""The fault table, through every decoder; `pytest -s` prints it as a matrix."""

import contextlib
import io
import struct
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from conftest import DALI_RESIZES, cpu_decoder, draw, runnable_decoders
from corpus import BROKEN, FAULTS, SILENT, SOUND, XMP, encode, exif_block, headed, segment
from fastrot.data.decode.batch import Batch
from fastrot.data.images import decode_upright
from fastrot.data.index import index, scan_file
from fastrot.data.manifest import Manifest
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
    """{fault: (manifest folder, the manifest before any verification, row of the fault or its reason)}: each in a folder with one sound image."""
    found = {}
    for number, (fault, data) in enumerate(FAULTS.items()):
        root = tmp_path_factory.mktemp(f"fault{number}")
        (root / "a").mkdir()
        (root / "a" / "fault.jpg").write_bytes(data)  # whatever it is: the name may lie
        (root / "a" / "sound.jpg").write_bytes(encode(draw(50, 40)))
        folder = index(str(root), root / "cache", 178_000_000, plain)
        manifest = Manifest.load(folder)
        reasons = [reason for place, reason in manifest.quarantined if "fault.jpg" in place]
        found[fault] = folder, manifest, reasons[0] if reasons else 0
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
    print("\n" + "fault".ljust(width), *(name.ljust(26) for name in DECODERS), sep="  ")
    for fault in FAULTS:
        print(fault.ljust(width), *(cells.get((fault, name), "").ljust(26) for name in DECODERS), sep="  ")


def windows_of(manifest: Manifest) -> np.ndarray:
    """The whole image, its upper left and its lower right."""
    height, width = int(manifest.height[0]), int(manifest.width[0])
    h, w = max(1, height // 2), max(1, width // 2)
    return np.array([(0, 0, height, width), (0, 0, h, w), (height - h, width - w, h, w)], np.int32)


@pytest.fixture
def by_pillow(monkeypatch):
    """What was decoded by Pillow's own hand: an entry an image."""
    calls: list[int] = []

    def spy(buffer, orientation):
        calls.append(orientation)
        return decode_upright(buffer, orientation)

    monkeypatch.setattr("fastrot.data.decode.torch.decode_upright", spy)
    return calls


def shown(decoder, manifest: Manifest, windows: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
    (buffer,) = FileStorage(manifest).read(np.array([0]))
    decoder.submit(Batch([buffer] * len(windows), manifest.orientation[[0] * len(windows)], windows, SIZE))
    pixels, bad = decoder.result()
    return pixels.numpy(), bad


def transposed(data: bytes) -> Image.Image:
    """The oracle, of Pillow alone: `exif_transpose`, XMP ignored, RGB; of 16 bits the high byte."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(data))
        for _ in range(2):  # before and after the pixels, behind which a PNG's may stand
            for key in ("xmp", "XML:com.adobe.xmp"):
                image.info.pop(key, None)
            image.load()
        try:
            image = ImageOps.exif_transpose(image)
        except (SyntaxError, ValueError, struct.error):  # a broken block, or one that it reads and cannot write anew
            image = _turned_as_read(image)
    values = np.asarray(image)
    if values.max(initial=0) > 255:
        image = Image.fromarray((values >> 8).astype(np.uint8))
    return image.convert("RGB")


def _turned_as_read(image: Image.Image) -> Image.Image:
    """As exif_transpose turns an image that has the tag alone; as it is where the tag cannot be read either."""
    with contextlib.suppress(SyntaxError, ValueError, struct.error):
        alone, copy = Image.Exif(), image.copy()
        alone[0x0112] = image.getexif().get(0x0112, 1)
        copy.info["exif"] = alone.tobytes()
        return ImageOps.exif_transpose(copy)
    return image


def pillow(data: bytes, window) -> np.ndarray:
    top, left, height, width = map(int, window)
    crop = transposed(data).crop((left, top, left + width, top + height))
    return np.asarray(crop.resize((SIZE, SIZE), Image.Resampling.BILINEAR), float)


@pytest.mark.parametrize("fault", SOUND)
def test_an_odd_image_shows_pillows_pixels(fault, indexed, decoder, matrix, by_pillow, capfd):
    _, manifest, row = indexed[fault]
    assert row == 0, row
    windows = windows_of(manifest)
    pixels, bad = shown(decoder, manifest, windows)
    assert not bad
    errors = [np.abs(pixels[at] - pillow(FAULTS[fault], window)).mean() for at, window in enumerate(windows)]
    hand = "Pillow's own hand" if by_pillow else "Pillow's pixels"
    matrix[fault, decoder.key] = f"{hand} ({max(errors):.2f})"
    said = "".join(capfd.readouterr())
    assert not said  # libjpeg's lines, at every decode
    assert max(errors) < MOST.get(decoder.key, 1.25)


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_image_is_quarantined_or_replaced(fault, indexed, decoder, matrix):
    """At indexing; or, where decoding alone shows it, while running: whole, and in its damaged part."""
    _, manifest, row = indexed[fault]
    if isinstance(row, str):
        matrix[fault, decoder.key] = "quarantined by index"
        return
    _, bad = shown(decoder, manifest, windows_of(manifest))
    matrix[fault, decoder.key] = "replaced while running"
    assert set(bad) == {0, 1, 2}


@pytest.mark.parametrize("fault", SILENT)
def test_silent_damage_is_found_by_verify_and_breaks_no_decoder(fault, indexed, decoder, matrix):
    folder, manifest, row = indexed[fault]
    assert row == 0, row
    windows = windows_of(manifest)
    pixels, bad = shown(decoder, manifest, windows)
    errors = [np.abs(pixels[at] - pillow(FAULTS[fault], w)).mean() for at, w in enumerate(windows) if at not in bad]
    assert not errors or max(errors) < MOST.get(decoder.key, 1.25)
    matrix[fault, decoder.key] = "found by index --verify"
    assert [
        reason for place, reason in verify(folder, plain) + Manifest.load(folder).quarantined if "fault.jpg" in place
    ]


ENTRIES = st.tuples(
    st.sampled_from([0x0112, 0x0112, 0x0100, 0x0213]),
    st.sampled_from([1, 3, 4, 8, 9]),
    st.lists(st.integers(0, 9), min_size=1, max_size=4),
)
BLOCKS = st.builds(
    exif_block,
    st.sampled_from(["II", "MM"]),
    st.lists(st.lists(ENTRIES, max_size=3), min_size=1, max_size=3),
    st.sampled_from([42, 42, 42, 44]),
)
CUT = st.one_of(st.just(10**6), st.integers(0, 60))
SEGMENTS = st.one_of(
    st.builds(lambda block, cut: segment(0xE1, b"Exif\0\0" + block[:cut]), BLOCKS, CUT),
    st.just(segment(0xE1, XMP)),
    st.just(segment(0xFE, b"a comment")),
)
SMALL = draw(24, 40)


def agrees(decoder, data: bytes, path, most: float) -> bool:
    """Whether indexing takes the file; then this decoder must show the oracle's pixels, whole and in a part."""
    path.write_bytes(data)
    found = scan_file(bytes(path), 0, -1, (0, 0), 10**6)
    if isinstance(found, str):
        return False
    height, width, _, orientation, *_ = found
    assert (width, height) == transposed(data).size
    windows = np.array([(0, 0, 8, 8), (3, 5, 8, 8), (height - 8, width - 8, 8, 8)], np.int32)  # nothing to resize
    decoder.submit(Batch([np.frombuffer(bytearray(data), np.uint8)] * 3, np.full(3, orientation, np.uint8), windows, 8))
    pixels, bad = decoder.result()
    assert not bad
    for at, (top, left, h, w) in enumerate(windows.tolist()):
        want = np.asarray(transposed(data).crop((left, top, left + w, top + h)), float)
        assert np.abs(pixels[at].numpy() - want).mean() < most
    return True


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("one") / "image"


@settings(max_examples=60, deadline=None)
@given(segments=st.lists(SEGMENTS, max_size=4), jfif=st.booleans())
def test_whatever_a_header_says_all_show_what_pillow_shows(decoder, path, segments, jfif):
    assert agrees(decoder, headed(*segments, jfif=jfif, picture=SMALL), path, MOST.get(decoder.key, 1.0))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_an_image_of_just_max_pixels_is_taken_and_one_pixel_more_is_not(path, kind):
    path.write_bytes(encode(SMALL, kind))
    assert scan_file(bytes(path), 0, -1, (0, 0), 24 * 40)[:2] == (24, 40)
    assert scan_file(bytes(path), 0, -1, (0, 0), 24 * 40 - 1) == "40x24 is above data.max_pixels 959"
    path.write_bytes(bytes(24 * 40 * 3))
    assert scan_file(bytes(path), 0, 24 * 40 * 3, (24, 40), 24 * 40)[:2] == (24, 40)
    assert scan_file(bytes(path), 0, 24 * 40 * 3, (24, 40), 959) == "40x24 is above data.max_pixels 959"


WHOLE_FILES = {
    "JPEG": encode(SMALL),
    "progressive": encode(SMALL, progressive=True),
    "restart markers": encode(SMALL, restart_marker_blocks=1),
    "thumbnail": headed(segment(0xE1, b"Exif\0\0" + exif_block("II", [[]]) + encode(draw(9, 9))), picture=SMALL),
    "PNG": encode(SMALL, "PNG"),
    "WebP": encode(SMALL, "WEBP", lossless=True),
    "WebP lossy": encode(SMALL, "WEBP", quality=80),
    "GIF": encode(SMALL.quantize(64), "GIF"),
    "TIFF": encode(SMALL, "TIFF"),
    "TIFF LZW": encode(SMALL, "TIFF", compression="tiff_lzw"),
    "BMP": encode(SMALL, "BMP"),
}


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(sorted(WHOLE_FILES)), at=st.one_of(st.floats(0, 1), st.integers(1, 80)))
def test_a_cut_file_is_judged_once_whatever_its_kind(decoder, path, kind, at):
    data = WHOLE_FILES[kind]
    kept = int(at * len(data)) if isinstance(at, float) else max(0, len(data) - at)
    sound = agrees(decoder, data[:kept], path, MOST.get(decoder.key, 1.0))
    assert kept == len(data) or not sound or kind in ("GIF", "TIFF", "WebP")
