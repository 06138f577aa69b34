"""turbo against Pillow's full decode and torch's resize; and against bytes that mean it harm."""

import io
import subprocess
import threading
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter, ImageOps
from torchvision.io import decode_jpeg
from torchvision.transforms.v2 import functional as F

from fastrot_kernels import build
from fastrot_kernels import turbo as module
from fastrot_kernels.turbo import BROKEN, NOT_OURS, Turbo

SOURCES = Path(build.__file__).parent / "turbo"


@pytest.fixture(scope="module")
def turbo():
    made = Turbo(2)
    yield made
    made.close()


def upright(n: int) -> np.ndarray:
    return np.ones(n, np.uint8)


def one(turbo, buffer, window, size, orientation=1) -> np.ndarray:
    turbo.submit([buffer], np.array([orientation], np.uint8), np.array([window]), size)
    out, failed = turbo.result()
    assert not failed, failed
    return out[0]


def grain(height: int, width: int, seed: int = 1) -> Image.Image:
    """Noise with some smoothness: every pixel matters to a test of equality."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(1))


def jpeg(image: Image.Image, **options) -> np.ndarray:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90, **options)
    return np.frombuffer(out.getvalue(), np.uint8).copy()


def torch_resize(pixels: np.ndarray, size: int) -> np.ndarray:
    upright = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    return F.resize(upright, [size, size], antialias=True).permute(1, 2, 0).numpy()


WAYS = {
    "444": {"subsampling": 0},
    "422": {"subsampling": 1},
    "420": {"subsampling": 2},
    "420 progressive": {"subsampling": 2, "progressive": True},
    "420 restarts": {"subsampling": 2, "restart_marker_blocks": 3},
    "gray": {},
}


@pytest.fixture(scope="module")
def encoded():
    """{way: (JPEG, its pixels by Pillow's full decode)} of an image no block divides."""
    made = {}
    for way, options in WAYS.items():
        image = grain(147, 203).convert("L") if way == "gray" else grain(147, 203)
        buffer = jpeg(image, **options)
        made[way] = buffer, np.asarray(Image.open(io.BytesIO(buffer)).convert("RGB"))
    return made


@pytest.mark.parametrize("way", WAYS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_window_is_decode_then_crop_then_torchs_resize(turbo, encoded, way, data):
    buffer, pixels = encoded[way]
    top, left = data.draw(st.integers(0, 146)), data.draw(st.integers(0, 202))
    height, width = data.draw(st.integers(1, 147 - top)), data.draw(st.integers(1, 203 - left))
    size = data.draw(st.sampled_from([8, 17, 32, 64, 225]))
    got = one(turbo, buffer, (top, left, height, width), size)
    want = torch_resize(pixels[top : top + height, left : left + width], size)
    assert np.array_equal(got, want), np.abs(got.astype(int) - want).max()


@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from([8, 31, 64]), st.data())
@settings(max_examples=60, deadline=None)
def test_raw_pixels_are_resampled_as_decoded_ones(turbo, height, width, size, data):
    pixels = np.random.default_rng(height * 91 + width).integers(0, 256, (height, width, 3), np.uint8)
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    h, w = data.draw(st.integers(1, height - top)), data.draw(st.integers(1, width - left))
    got = one(turbo, pixels, (top, left, h, w), size)
    assert np.array_equal(got, torch_resize(pixels[top : top + h, left : left + w], size))


@given(st.floats(0, 60), st.floats(0, 90), st.floats(0.5, 80), st.floats(0.5, 100), st.sampled_from([8, 33, 96]))
@settings(max_examples=60, deadline=None)
def test_a_float_box_is_pillows_resize_of_a_box_within_two_levels(turbo, encoded, top, left, height, width, size):
    buffer, pixels = encoded["444"]
    box = (left, top, left + width, top + height)
    want = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR, box), int)
    assert np.abs(one(turbo, buffer, (top, left, height, width), size) - want).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [16, 40])
@pytest.mark.parametrize("boxed", [False, True])
def test_windows_are_of_the_upright_image(turbo, orientation, size, boxed):
    """As the number says, not as the file does; a file or pixels alike."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = io.BytesIO(jpeg(grain(60, 90), exif=exif, subsampling=0))
    buffer = jpeg(grain(60, 90), exif=Image.Exif(), subsampling=0)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(turned)).convert("RGB"))
    window = (7, 11, 31, 42.0 if boxed else 42)
    if boxed:
        box = (11, 7, 11 + 42, 7 + 31)
        want = np.asarray(Image.fromarray(upright).resize((size, size), Image.Resampling.BILINEAR, box), int)
    else:
        want = torch_resize(upright[7 : 7 + 31, 11 : 11 + 42], size).astype(int)
    most = (1 if orientation >= 5 else 0) + boxed
    got = one(turbo, buffer, window, size, orientation)
    assert np.abs(got - want).max() <= most
    stored = np.asarray(Image.open(io.BytesIO(buffer)).convert("RGB"))
    assert np.array_equal(one(turbo, stored, window, size, orientation), got)
    assert np.array_equal(one(turbo, np.frombuffer(turned.getvalue(), np.uint8), window, size, orientation), got)


@contextmanager
def built(flag):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_library", partial(module._library, flag))
        made = Turbo(2)
    yield made
    made.close()


@pytest.fixture(scope="module")
def plain():
    """Built without any code for one processor alone."""
    with built("-DPLAIN") as made:
        yield made


@pytest.fixture(scope="module")
def avx2():
    """Built without AVX-512, which this machine may have."""
    with built("-DAVX2_ALONE") as made:
        yield made


@given(st.integers(1, 140), st.integers(1, 200), st.sampled_from([1, 3, 8, 31, 64, 225]), st.booleans(), st.data())
@settings(max_examples=80, deadline=None)
def test_plain_c_is_the_simd_code_bit_for_bit(turbo, plain, avx2, encoded, height, width, size, boxed, data):
    top, left = data.draw(st.integers(0, 147 - height)), data.draw(st.integers(0, 203 - width))
    way = data.draw(st.sampled_from(sorted(WAYS)))
    window = (top, left, height - 0.3 * boxed, width)
    for buffer in encoded[way]:  # the file, and its pixels
        want = one(plain, buffer, window, size)
        assert np.array_equal(one(avx2, buffer, window, size), want)
        assert np.array_equal(one(turbo, buffer, window, size), want)


def test_memory_is_written_again_once_nobody_looks_at_it(turbo, encoded):
    def pixels(size=64):
        turbo.submit([encoded["420"][0]], upright(1), np.array([(0, 0, 147, 203)]), size)
        return turbo.result()[0]

    first = torch.from_numpy(pixels())
    looks, was, at = first[0, :3], first.clone(), first.data_ptr()
    del first
    others = [pixels() for _ in range(12)]
    assert torch.equal(looks, was[0, :3]) and at not in [other.ctypes.data for other in others]
    del looks
    assert at in [other.ctypes.data for other in [pixels() for _ in range(2)]]
    assert pixels(32).shape == (1, 32, 32, 3)


@pytest.mark.parametrize("way", WAYS)
def test_a_file_without_its_last_bytes_is_judged_as_libjpeg_does(turbo, encoded, way):
    """Our own Huffman decoder does not end where libjpeg would ask for more; nor ask where it would not."""
    whole = encoded[way][0]
    for missing in range(64):
        buffer = whole[: len(whole) - missing].copy()
        try:
            decode_jpeg(torch.from_numpy(buffer))
            sound = True
        except RuntimeError:
            sound = False
        turbo.submit([buffer], upright(1), np.array([(0, 0, 147, 203)]), 8)
        out, failed = turbo.result()
        if missing in (1, 2) and not failed:  # the end marker alone: all that is coded may have been read before
            assert np.array_equal(out[0], one(turbo, whole, (0, 0, 147, 203), 8))
        else:
            assert not failed if sound else failed[0][0] == BROKEN, missing


@pytest.mark.parametrize("scans, refused", [(256, False), (257, True)])
def test_a_file_of_more_than_256_scans_is_refused(turbo, scans, refused):
    data = bytes(jpeg(grain(9, 9).convert("L"), progressive=True))
    starts = [at for at in range(len(data)) if data[at : at + 2] == b"\xff\xda"]
    first = data[starts[0] : data.index(b"\xff", starts[0] + 12)]  # the DC's first scan, up to a marker
    many = data[: starts[0]] + first * scans + b"\xff\xd9"
    turbo.submit([np.frombuffer(many, np.uint8)], upright(1), np.array([(0, 0, 9, 9)]), 8)
    _, failed = turbo.result()
    assert failed == ({0: (BROKEN, "has more than 256 scans")} if refused else {})


def test_the_fast_mode_changes_large_windows_alone(turbo):
    fast = Turbo(1, fast=True)
    buffer = jpeg(Image.fromarray(np.asarray(grain(50, 50).resize((400, 400), Image.Resampling.BICUBIC))))
    small, large = (0, 0, 120, 399), (0, 0, 400, 399)
    assert np.array_equal(one(fast, buffer, small, 64), one(turbo, buffer, small, 64))
    difference = np.abs(one(fast, buffer, large, 64).astype(int) - one(turbo, buffer, large, 64))
    assert 0 < difference.mean() < 1.5
    fast.close()


def test_what_is_not_ours_is_said(turbo):
    png = io.BytesIO()
    grain(9, 9).save(png, "PNG")
    buffers = [
        np.frombuffer(png.getvalue(), np.uint8).copy(),
        jpeg(grain(9, 9).convert("CMYK")),
        np.zeros(0, np.uint8),
        jpeg(grain(90, 90))[:700],
        jpeg(grain(9, 9)),
    ]
    turbo.submit(buffers, upright(5), np.array([(0, 0, 9, 9)] * 3 + [(0, 0, 90, 90), (0, 0, 10, 9)], np.int32), 8)
    _, failed = turbo.result()
    assert [failed[at][0] for at in range(5)] == [NOT_OURS, NOT_OURS, NOT_OURS, BROKEN, BROKEN]
    assert "truncated" in failed[3][1] and "9x9, not as indexed" in failed[4][1]


def test_batches_come_back_in_order_whatever_their_sizes(turbo, encoded):
    buffer, _ = encoded["420"]
    sizes = [8, 64, 16]
    for n, size in enumerate(sizes):
        windows = np.array([(n, n, 90, 90)] * (5 * n), np.int32).reshape(-1, 4)
        turbo.submit([buffer] * (5 * n), upright(5 * n), windows, size)
    results = [turbo.result() for _ in sizes]
    for n, (size, (out, failed)) in enumerate(zip(sizes, results, strict=True)):
        assert out.shape == (5 * n, size, size, 3) and not failed
        assert all(np.array_equal(one(turbo, buffer, (n, n, 90, 90), size), image) for image in out)


@given(
    st.sampled_from(sorted(WAYS)),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=12),
    st.floats(0, 1),
)
@settings(max_examples=200, deadline=None)
def test_damaged_bytes_give_pixels_or_a_reason(turbo, encoded, way, changes, cut):
    buffer = encoded[way][0].copy()
    for where, value in changes:
        buffer[int(where * (len(buffer) - 1))] = value
    buffer = buffer[: max(1, int((1 - cut * cut) * len(buffer)))]
    turbo.submit([buffer], upright(1), np.array([(20, 30, 90, 100)], np.int32), 32)
    _, failed = turbo.result()
    assert not failed or failed[0][0] == NOT_OURS or failed[0][1]


def test_a_build_that_fails_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTROT_CACHE", str(tmp_path))
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.c").write_text("#include <no_such_header.h>\n")
    with pytest.raises(build.BuildError, match=r"no_such_header\.h"):
        build.library(tmp_path / "source", "a")
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(build.BuildError, match="no-such-compiler"):
        build.library(tmp_path / "source", "a")


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    """Files whose Huffman codes, block layouts and densities differ; none is progressive."""
    folder = tmp_path_factory.mktemp("baseline")
    for quality in (3, 60, 100):
        for way, options in WAYS.items():
            image = grain(147, 203, quality)
            if "progressive" not in way:
                image = image.convert("L") if way == "gray" else image
                image.save(folder / f"{way} {quality}.jpg", quality=quality, optimize=quality == 60, **options)
    odd = bytearray((folder / "gray 60.jpg").read_bytes())
    odd[odd.index(b"\xff\xc0") + 11] = 0x22  # sampling factors say nothing where there is one component
    (folder / "gray, two by two.jpg").write_bytes(odd)
    return sorted(map(str, folder.iterdir()))


def check_entropy(folder: Path, rounds: int, files: list[str], *flags: str) -> tuple[int, int]:
    """(windows equal, damaged files given up) by check_entropy.c, which exits with an error where one differs."""
    built = str(folder / "check")
    sources = [str(Path(__file__).with_name("check_entropy.c")), str(SOURCES / "entropy.c")]
    subprocess.run(["cc", "-O1", "-std=c11", *flags, f"-I{SOURCES}", *sources, "-o", built, "-ljpeg"], check=True)
    done = subprocess.run([built, str(rounds), *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    equal, given_up = map(int, done.stdout.split())
    return equal, given_up


def test_huffman_decoding_of_our_own_equals_libjpegs_and_gives_up_no_sound_file(tmp_path, baseline):
    equal, given_up = check_entropy(tmp_path, 40, baseline)
    assert equal >= 40 * len(baseline) and given_up > 40


def test_huffman_decoding_of_our_own_equals_libjpegs_on_photographs(tmp_path, shared_data):
    files = sorted(map(str, shared_data("imagenet_sample").glob("*/*.J*")))
    equal, _ = check_entropy(tmp_path, 3, files)
    assert equal > 3 * 0.9 * len(files)  # a few are progressive


@pytest.mark.slow
def test_damaged_huffman_data_reach_no_memory_that_is_not_ours(tmp_path, baseline):
    checks = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    equal, given_up = check_entropy(tmp_path, 2000, baseline, *checks)
    assert equal > 2000 * len(baseline) and given_up > 1000


@pytest.mark.slow
def test_no_damage_reaches_memory_that_is_not_ours(tmp_path, encoded):
    """A build with the compiler's address and undefined-behaviour checks, over many damaged files."""
    for way, (buffer, _) in encoded.items():
        buffer.tofile(tmp_path / f"{way}.jpg")
    checks = ["-O1", "-g", "-std=c11", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = [str(SOURCES / f"{name}.c") for name in ("window", "entropy", "resample")]
    driver = str(Path(__file__).with_name("fuzz_turbo.c"))
    built = str(tmp_path / "fuzz")
    subprocess.run(["cc", *checks, f"-I{SOURCES}", driver, *sources, "-o", built, "-ljpeg", "-lm"], check=True)
    done = subprocess.run([built, "3000", *sorted(map(str, tmp_path.glob("*.jpg")))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    sound, bad = map(int, done.stdout.split())
    assert sound > 1000 and bad > 1000


def test_dropped_with_a_batch_in_flight_its_threads_end(encoded):
    threads = len(list(Path("/proc/self/task").iterdir()))
    turbo = Turbo(3)
    turbo.submit([encoded["444"][0]] * 200, upright(200), np.array([(0, 0, 8, 8)] * 200, np.int32), 224)
    del turbo
    assert len(list(Path("/proc/self/task").iterdir())) == threads


def test_closing_waits_for_a_thread_that_waits_for_a_batch():
    """Whose memory the pool would else take away, and with it the process."""
    turbo, begun, ended = Turbo(1), threading.Event(), []
    photo = jpeg(grain(700, 700))

    def work():
        try:
            while True:
                one(turbo, photo, (0, 0, 700, 700), 32)
                begun.set()
        except RuntimeError as error:
            ended.append(str(error))

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    begun.wait()
    turbo.close()
    worker.join(60)
    assert ended == ["turbo is closed"]
