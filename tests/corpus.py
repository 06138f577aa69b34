"""The images of the fault table, made here: {fault: bytes}, by what each must get."""

import io
import struct
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from conftest import draw

simplejpeg = pytest.importorskip("simplejpeg", reason="simplejpeg, which writes some of the corpus, is not installed")
HEIGHT, WIDTH = 93, 131  # no block size divides them
PICTURE = draw(HEIGHT, WIDTH, 3)
WHOLE = np.asarray(PICTURE)


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **({"quality": 92} if kind == "JPEG" else {}), **options)
    return out.getvalue()


def sampled(layout: str) -> bytes:
    return simplejpeg.encode_jpeg(np.ascontiguousarray(WHOLE), 92, "RGB", layout)


def four_colours(space: str, adobe: bool) -> bytes:
    """CMYK as Pillow writes it, or YCCK as libjpeg-turbo does; with or without Adobe's marker."""
    cmyk = PICTURE.convert("CMYK")
    data = encode(cmyk) if space == "CMYK" else simplejpeg.encode_jpeg(np.array(cmyk), 92, "CMYK", "444")
    if not adobe:
        at = data.index(b"\xff\xee")
        data = data[:at] + data[at + 2 + struct.unpack(">H", data[at + 2 : at + 4])[0] :]
    return data


def oriented(orientation: int, kind: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(PICTURE, kind, exif=exif)


def with_segment(marker: int, content: bytes) -> bytes:
    """The picture with a marker segment behind its first one."""
    plain = encode(PICTURE)
    segment = bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content
    return plain[:2] + segment + plain[2:]


def sixteen_bits(kind: str) -> bytes:
    deep = np.asarray(PICTURE.convert("L"), np.uint16) * 256 + 77
    return encode(Image.fromarray(deep), kind)


XMP = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'

SOUND = {
    "baseline": encode(PICTURE),
    "grayscale": encode(PICTURE.convert("L")),
    "CMYK, Adobe's marker": four_colours("CMYK", True),
    "CMYK, no marker": four_colours("CMYK", False),
    "YCCK": four_colours("YCCK", True),
    **{f"{layout} sampling": sampled(layout) for layout in ("444", "422", "440", "420", "411")},
    "progressive": encode(PICTURE, progressive=True),
    "restart markers": encode(PICTURE, restart_marker_blocks=2),
    "RGB kept": encode(PICTURE, keep_rgb=True),
    "ICC profile": encode(PICTURE, icc_profile=bytes(range(256)) * 300),
    "embedded thumbnail": with_segment(0xE0, b"JFXX\0\x10" + encode(draw(20, 30))),
    "bytes after EOI": encode(PICTURE) + bytes(range(200)),
    "another image after EOI": encode(PICTURE) * 2,
    **{f"EXIF orientation {o}": oriented(o) for o in range(1, 9)},
    "EXIF orientation 0": oriented(0),
    "EXIF orientation 9": oriented(9),
    "broken EXIF": encode(PICTURE, exif=b"Exif\0\0" + b"junk" * 30),
    "EXIF cut short": encode(PICTURE, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01\x12"),
    "orientation in XMP alone": with_segment(0xE1, XMP),
    "PNG": encode(PICTURE, "PNG"),
    "PNG palette": encode(PICTURE.quantize(64), "PNG"),
    "PNG alpha": encode(PICTURE.convert("RGBA"), "PNG"),
    "PNG gray": encode(PICTURE.convert("L"), "PNG"),
    "PNG 16 bits": sixteen_bits("PNG"),
    "TIFF": encode(PICTURE, "TIFF"),
    "TIFF 16 bits": sixteen_bits("TIFF"),
    "WebP": encode(PICTURE, "WEBP", lossless=True),
    "BMP": encode(PICTURE, "BMP"),
    "GIF": encode(PICTURE.quantize(64), "GIF"),
    "GIF of two frames": encode(PICTURE.quantize(64), "GIF", save_all=True, append_images=[draw(HEIGHT, WIDTH, 9)]),
    **{f"{kind} orientation {o}": oriented(o, kind) for kind in ("PNG", "WEBP", "TIFF") for o in (3, 6)},
    "1x1": encode(draw(1, 1)),
    "1x5000": encode(draw(5000, 1)),
    "5000x1": encode(draw(1, 5000)),
}


def cut(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


def frame_at(data: bytes) -> int:
    """Where a baseline JPEG's frame header begins."""
    return data.index(b"\xff\xc0")


def patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def header_of(side: int) -> bytes:
    """A PNG that claims side x side pixels and has none."""
    png = encode(PICTURE, "PNG")
    return patched(png, 16, struct.pack(">II", side, side))


BASE = encode(PICTURE)
FRAME = frame_at(BASE)
BROKEN = {
    "truncated at 1%": cut(BASE, 0.01),
    "truncated at 50%": cut(BASE, 0.5),
    "truncated at 99%": cut(BASE, 0.99),
    "EOI missing": BASE[:-2],
    "progressive, truncated at 60%": cut(encode(PICTURE, progressive=True), 0.6),
    "zero length": b"",
    "garbage": bytes(np.random.default_rng(0).integers(0, 256, 4000, np.uint8)),
    "header only": BASE[: BASE.index(b"\xff\xda") + 2],
    "12 bits": patched(BASE, FRAME + 4, b"\x0c"),
    "lossless process": patched(BASE, FRAME, b"\xff\xc3"),
    "bomb, PNG": header_of(60_000),
    "bomb, JPEG": patched(BASE, FRAME + 5, struct.pack(">HH", 60_000, 60_000)),
    "PNG truncated at 50%": cut(encode(PICTURE, "PNG"), 0.5),
    "WebP truncated at 50%": cut(encode(PICTURE, "WEBP", lossless=True), 0.5),
    "GIF truncated at 50%": cut(encode(PICTURE.quantize(64), "GIF"), 0.5),
    "TIFF truncated at 50%": cut(encode(PICTURE, "TIFF"), 0.5),
    "BMP truncated at 50%": cut(encode(PICTURE, "BMP"), 0.5),
}


def damaged(data: bytes) -> bytes:
    """Other bits in the middle of the entropy-coded data: none of them a marker."""
    middle = (data.index(b"\xff\xda") + len(data)) // 2
    return patched(data, middle, bytes(np.random.default_rng(1).integers(0, 255, 120, np.uint8)))


# What decoders show without a word, and `fastrot index --verify` finds.
SILENT = {
    "arithmetic coding, of Huffman's bits": patched(BASE, FRAME, b"\xff\xc9"),
    "Huffman data corrupt in the middle": damaged(BASE),
    "cut at 50%, EOI glued on": cut(BASE, 0.5) + b"\xff\xd9",
    "cut at 90%, EOI glued on": cut(BASE, 0.9) + b"\xff\xd9",
    "taller in the header than in the data": patched(BASE, FRAME + 5, struct.pack(">H", 2 * HEIGHT)),
    "shorter in the header than in the data": patched(BASE, FRAME + 5, struct.pack(">H", HEIGHT // 2)),
    "wider in the header than in the data": patched(BASE, FRAME + 7, struct.pack(">H", 2 * WIDTH)),
}

FAULTS = {**SOUND, **BROKEN, **SILENT}
assert not any(set(a) & set(b) for a, b in pairwise((SOUND, BROKEN, SILENT)))
