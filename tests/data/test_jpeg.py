"""A JPEG's frame by its markers, against Pillow."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from conftest import draw
from corpus import of_scans, segment
from fastrot.data.jpeg import Frame, frame_in, frame_of, too_many_scans


def encoded(image: Image.Image, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", **options)
    return out.getvalue()


@pytest.mark.parametrize("mode, components, usual", [("RGB", 3, True), ("L", 1, True), ("CMYK", 4, False)])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("exif", [None, 6])
def test_the_frame_is_pillows(mode, components, usual, progressive, exif):
    block = Image.Exif()
    block[0x0112] = exif or 1
    data = encoded(draw(31, 47).convert(mode), progressive=progressive, **({"exif": block} if exif else {}))
    after = data.index(b"\xff\xda") + 2
    after += int.from_bytes(data[after : after + 2], "big")
    assert frame_of(data) == Frame(31, 47, components, usual, after, not progressive)


def test_a_frame_that_few_decode_is_unusual():
    data = bytearray(encoded(draw(31, 47)))
    data[data.index(b"\xff\xc0") + 1] = 0xC9  # arithmetic-coded
    assert not frame_of(data).usual


@pytest.mark.parametrize("scans", [1, 10, 256, 257, 400])
def test_scans_are_counted_up_to_the_end_marker(scans):
    data = of_scans(scans)
    (at, end), look_alike = (data.index(b"\xff\xda"), len(data) - 2), segment(0xFE, b"\xff\xda" * 400)
    for odd in (data, data[:at] + look_alike + data[at:], data[:end] + look_alike + data[end:], data * 30):
        file = io.BytesIO(odd)
        assert too_many_scans(file, frame_in(file)) == (scans > 256)


def test_a_file_of_one_scan_is_not_read_for_more():
    frame = frame_of(encoded(draw(31, 47)))
    assert frame.one_scan and not too_many_scans(None, frame)
    apart = bytearray(encoded(draw(31, 47)))
    apart[apart.index(b"\xff\xda") + 4] = 1  # its components in a scan each
    assert not frame_of(apart).one_scan


@given(st.binary(max_size=80), st.integers(0, 700))
def test_any_bytes_have_a_frame_or_none(junk, keep):
    for data in (junk, b"\xff\xd8" + junk, encoded(draw(9, 9))[:keep], encoded(draw(9, 9))[:keep] + junk):
        frame = frame_of(data)
        assert frame is None or isinstance(frame, Frame)
