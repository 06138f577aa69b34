"""The tag in a file's bytes; oracle: Pillow, which reads it, and shows images by it."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.ExifTags import IFD

from corpus import PICTURE, encode, exif_block
from fastrot.orient.exif import Refused, composed, orientation_in, settled, tagged

SQUARE = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
SMALL = PICTURE.resize((32, 16))
THUMBNAIL = encode(SMALL)
CLOCKWISE = {0: None, 90: Image.Transpose.ROTATE_270, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_90}


def shown_by(image, orientation):
    """By Pillow's own reading of the tag."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = image.copy()
    image.info["exif"] = exif.tobytes()
    return ImageOps.exif_transpose(image)


def rich(order, orientation=None, padding=0):
    """A block with a camera's name, sides, a maker's note and a thumbnail."""
    first = [(0x010F, 2, "Maker of cameras\0"), (0x8769, 4, 0), (0x9999, 7, bytes(padding) + b"note")]
    sign = {"II": "<", "MM": ">"}[order]
    first += [(0x0112, 3, orientation)] if orientation else []
    details = [(0xA002, 4, 640), (0xA003, 4, 480), (0x927C, 7, b"a maker's note, with offsets of its own")]
    thumbnail = [(0x0112, 3, orientation or 1), (0x0201, 4, 0), (0x0202, 4, len(THUMBNAIL))]
    starts, at = [], 8
    for entries in (first, details, thumbnail):
        starts.append(at)
        at += 6 + 12 * len(entries)
    out, elsewhere = b"", b""
    for number, entries in enumerate((first, details, thumbnail)):
        out += struct.pack(sign + "H", len(entries))
        for tag, kind, value in sorted(entries, key=lambda entry: entry[0]):
            value = starts[1] if tag == 0x8769 else value
            if tag == 0x0201:
                value, elsewhere = at + len(elsewhere), elsewhere + THUMBNAIL
            if isinstance(value, int):
                content = struct.pack(sign + ("HH" if kind == 3 else "I"), *((value, 0) if kind == 3 else (value,)))
                out += struct.pack(sign + "HHI", tag, kind, 1) + content
            else:
                value = value.encode() if isinstance(value, str) else value
                out += struct.pack(sign + "HHII", tag, kind, len(value), at + len(elsewhere))
                elsewhere += value + bytes(len(value) % 2)
        out += struct.pack(sign + "I", starts[2] if number == 0 else 0)
    return order.encode() + struct.pack(sign + "HI", 42, 8) + out + elsewhere


def read(data):
    """Orientation, all tags, the sides, the maker's note, the thumbnail's tags, as Pillow has them."""
    exif = Image.open(io.BytesIO(data)).getexif()
    details = exif.get_ifd(0x8769)
    first = {tag: value for tag, value in exif.items() if tag not in (0x0112, 0x8769)}
    return (
        exif.get(0x0112),
        first,
        (details.get(0xA002), details.get(0xA003)),
        details.get(0x927C),
        exif.get_ifd(IFD.IFD1),
    )


def pixels(data, kind="JPEG"):
    if kind == "JPEG":
        data = data[data.rindex(b"\xff\xc0") :]  # from the frame on, behind a thumbnail
        return data
    return np.asarray(Image.open(io.BytesIO(data))).tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("clockwise", CLOCKWISE)
def test_tag_and_answer_compose_as_the_turns_do(orientation, clockwise):
    shown = shown_by(SQUARE, orientation)
    upright = shown if CLOCKWISE[clockwise] is None else shown.transpose(CLOCKWISE[clockwise])
    assert np.array_equal(shown_by(SQUARE, composed(orientation, clockwise)), upright)


@pytest.mark.parametrize("order", ["II", "MM"])
@pytest.mark.parametrize("orientation", [None, 1, 6, 7])
def test_a_tag_is_set_and_all_else_stays(order, orientation):
    jpeg = encode(SMALL, exif=b"Exif\0\0" + rich(order, orientation))
    new = tagged(jpeg, "JPEG", 8)
    before, after = read(jpeg), read(new)
    assert after[0] == 8 and after[1:4] == before[1:4] and pixels(new) == pixels(jpeg)
    assert after[4][0x0112] == 8 and after[4][0x0202] == len(THUMBNAIL) and THUMBNAIL in new
    if orientation:  # two bytes of the image's tag, two of its thumbnail's
        assert len(new) == len(jpeg) and sum(a != b for a, b in zip(new, jpeg, strict=True)) == 2 * (orientation != 8)


def test_a_jpeg_without_exif_gets_a_small_block_behind_jfif():
    jpeg = encode(SMALL)
    new = tagged(jpeg, "JPEG", 6)
    assert orientation_in(new, "JPEG") == 6 and len(new) - len(jpeg) < 50
    assert new[:20] == jpeg[:20] and new[20:22] == b"\xff\xe1" and new.endswith(jpeg[20:])


def test_what_is_turned_says_so_and_drops_its_thumbnail():
    jpeg = encode(SMALL, exif=b"Exif\0\0" + rich("II", 6))
    new = settled(jpeg, "JPEG", quarter=True)
    before, after = read(jpeg), read(new)
    assert after[0] == 1 and after[1] == before[1] and after[3] == before[3]
    assert before[2] == (640, 480) and after[2] == (480, 640)
    assert before[4] and not after[4]


def test_a_tag_in_xmp_says_the_same():
    xmp = b"http://ns.adobe.com/xap/1.0/\0" + b'<x tiff:Orientation="6"/><tiff:Orientation>6</tiff:Orientation>'
    jpeg = encode(SMALL, exif=b"Exif\0\0" + rich("II", 6))
    jpeg = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(xmp) + 2) + xmp + jpeg[2:]
    new = settled(jpeg, "JPEG", quarter=False)
    assert xmp.replace(b"6", b"1") in new


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("there", [False, True])
def test_tags_of_other_kinds(kind, there):
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    if there:
        exif[0x0112] = 5
    data = encode(SMALL, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    new = tagged(data, kind, 3)
    found = Image.open(io.BytesIO(new))
    assert found.getexif()[0x0112] == 3 and found.getexif()[0x010F] == "Maker" and orientation_in(new, kind) == 3
    upright = ImageOps.exif_transpose(found)
    assert np.array_equal(upright, SMALL.transpose(Image.Transpose.ROTATE_180))


def test_a_png_without_a_block_gets_one():
    new = tagged(encode(SMALL, "PNG"), "PNG", 6)
    assert np.array_equal(
        ImageOps.exif_transpose(Image.open(io.BytesIO(new))), SMALL.transpose(Image.Transpose.ROTATE_270)
    )


@pytest.mark.parametrize(
    ("kind", "data", "says"),
    [
        ("BMP", encode(SMALL, "BMP"), "no place"),
        ("WEBP", encode(SMALL, "WEBP"), "without an EXIF block"),
        ("JPEG", encode(SMALL, exif=b"Exif\0\0II*\0\xff\xff\0\0"), "broken"),
        ("JPEG", encode(SMALL, exif=b"Exif\0\0" + rich("II", padding=65_533 - 14 - len(rich("II")))), "full"),
        ("JPEG", encode(SMALL)[:30], "header"),
        ("other", b"P6 1 1 255 abc", "no place"),
    ],
)
def test_what_cannot_be_tagged_is_refused_in_words(kind, data, says):
    with pytest.raises(Refused, match=says):
        tagged(data, kind, 6)


def test_a_directory_of_the_corpus_is_read_as_it_stands():
    block = exif_block("MM", [[(0x0112, 3, [7])]])
    assert orientation_in(encode(SMALL, exif=b"Exif\0\0" + block), "JPEG") == 7
