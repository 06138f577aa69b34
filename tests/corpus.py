"""The images of the fault table, made here: {fault: bytes}, by what each must get."""

import io
import struct
import zlib
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


def exif_block(order: str, directories: list[list[tuple[int, int, list[int]]]], magic: int = 42) -> bytes:
    """A TIFF block: in each directory (tag, type, values); values of more than four bytes stand elsewhere, at the end."""
    sign = {"II": "<", "MM": ">"}[order]
    form = {1: "B", 3: "H", 4: "I", 8: "h", 9: "i"}
    head = order.encode() + struct.pack(sign + "HI", magic, 8)
    at = 8 + sum(6 + 12 * len(entries) for entries in directories)
    out, elsewhere, start = b"", b"", 8
    for number, entries in enumerate(directories, 1):
        start += 6 + 12 * len(entries)
        out += struct.pack(sign + "H", len(entries))
        for tag, kind, values in entries:
            data = struct.pack(sign + form[kind] * len(values), *values)
            out += struct.pack(sign + "HHI", tag, kind, len(values))
            if len(data) > 4:
                out += struct.pack(sign + "I", at + len(elsewhere))
                elsewhere += data
            else:
                out += data.ljust(4, b"\0")
        out += struct.pack(sign + "I", start if number < len(directories) else 0)
    return head + out + elsewhere


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def headed(*segments: bytes, jfif: bool = False, picture: Image.Image | None = None) -> bytes:
    """The picture with these segments first, behind JFIF's or without it."""
    plain = encode(picture or PICTURE)
    length = 2 + struct.unpack(">H", plain[4:6])[0]
    return plain[:2] + plain[2 : 2 + length] * jfif + b"".join(segments) + plain[2 + length :]


def exif_of(orientation: int, order: str = "II", kind: int = 3) -> bytes:
    return segment(0xE1, b"Exif\0\0" + exif_block(order, [[(0x0112, kind, [orientation])]]))


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_with(chunk: bytes, before: bytes) -> bytes:
    """The picture as a PNG with a chunk put before another."""
    plain = encode(PICTURE, "PNG")
    at = plain.index(before) - 4
    return plain[:at] + chunk + plain[at:]


def raw_profile(orientation: int) -> bytes:
    """EXIF as ImageMagick writes it into a PNG's text."""
    block = b"Exif\0\0" + exif_block("II", [[(0x0112, 3, [orientation])]])
    return png_chunk(b"tEXt", b"Raw profile type exif\0" + f"\nexif\n{len(block):8}\n{block.hex()}\n".encode())


def scan_parameters(data: bytes, new: bytes) -> bytes:
    """A sequential JPEG whose scan header tells another part of the coefficients: libjpeg warns, and decodes."""
    at = data.index(b"\xff\xda") + 2
    at += struct.unpack(">H", data[at : at + 2])[0] - 3
    return data[:at] + new + data[at + 3 :]


def patched_components(data: bytes) -> bytes:
    """A JPEG without JFIF whose components are called R, G, B: libjpeg takes them for that."""
    plain = data[:2] + data[4 + struct.unpack(">H", data[4:6])[0] :]
    frame, scan = plain.index(b"\xff\xc0") + 10, plain.index(b"\xff\xda") + 5
    named = bytearray(plain)
    named[frame : frame + 9 : 3], named[scan : scan + 6 : 2] = b"RGB", b"RGB"
    return bytes(named)


def top_down(bmp: bytes) -> bytes:
    rows = np.frombuffer(bmp[54:], np.uint8).reshape(HEIGHT, -1)[::-1]
    return bmp[:22] + struct.pack("<i", -HEIGHT) + bmp[26:54] + rows.tobytes()


def of_scans(count: int) -> bytes:
    """A gray block in a progressive JPEG of so many scans, each as it should be: pass by pass a bit more of one coefficient
    after the other, all of them 0."""
    first = encode(Image.new("L", (8, 8), 90), progressive=True)
    end = first.index(b"\xff", first.index(b"\xff\xda") + 10)  # of the scan of the block's mean
    table = segment(0xC4, b"\x10\x01" + bytes(15) + b"\0")  # one code, of one bit: no more coefficients
    passes = [(0, 12), *((bit + 1, bit) for bit in reversed(range(12)))]
    scans = [(k, before << 4 | now) for before, now in passes for k in range(1, 64)][: count - 1]
    body = b"".join(segment(0xDA, bytes([1, 1, 0, k, k, bits])) + b"\x7f" for k, bits in scans)
    return first[:end] + table + body + b"\xff\xd9"


OTHER = draw(HEIGHT, WIDTH, 9)
_FADING = np.dstack([WHOLE, np.tile(np.arange(WIDTH, dtype=np.uint8), (HEIGHT, 1))])
FADING = Image.fromarray(_FADING)
GRAY = np.asarray(PICTURE.convert("L"))

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
    "XMP before EXIF, no JFIF": headed(segment(0xE1, XMP), exif_of(3)),
    "orientation as a big-endian LONG": headed(exif_of(8, "MM", 4)),
    "two EXIF blocks": headed(exif_of(6), exif_of(3)),
    "EXIF before JFIF": headed(exif_of(6), segment(0xE0, b"JFIF\0\1\2\0\0\1\0\1\0\0")),
    "orientation in the thumbnail's directory alone": headed(
        segment(0xE1, b"Exif\0\0" + exif_block("II", [[(0x0100, 3, [9])], [(0x0112, 3, [6])]]))
    ),
    "XMP's orientation beside EXIF's": headed(segment(0xE1, XMP), exif_of(1)),
    "RGB by the components' names": patched_components(encode(PICTURE)),
    "odd scan parameters": scan_parameters(encode(PICTURE), b"\0\0\0"),
    "JFIF of a revision to come": encode(PICTURE).replace(b"JFIF\0\x01", b"JFIF\0\x03", 1),
    "PNG animated": encode(PICTURE, "PNG", save_all=True, append_images=[OTHER]),
    "PNG animated, default image hidden": encode(
        PICTURE, "PNG", save_all=True, default_image=True, append_images=[OTHER, PICTURE]
    ),
    "PNG alpha that fades": encode(FADING, "PNG"),
    "PNG a colour transparent": encode(PICTURE, "PNG", transparency=(1, 2, 3)),
    "PNG a palette's colour transparent": encode(PICTURE.quantize(64), "PNG", transparency=3),
    "PNG 4 bits": encode(PICTURE.quantize(10), "PNG", bits=4),
    "PNG gray and alpha": encode(FADING.convert("LA"), "PNG"),
    "PNG gamma": png_with(png_chunk(b"gAMA", struct.pack(">I", 100_000)), b"IDAT"),
    "PNG orientation behind the pixels": png_with(png_chunk(b"eXIf", exif_block("MM", [[(0x0112, 3, [6])]])), b"IEND"),
    "PNG orientation in a raw profile": png_with(raw_profile(6), b"IDAT"),
    "PNG orientation in XMP alone": png_with(png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP), b"IDAT"),
    "WebP lossy": encode(PICTURE, "WEBP", quality=90),
    "WebP alpha that fades": encode(FADING, "WEBP", lossless=True),
    "WebP animated": encode(PICTURE, "WEBP", save_all=True, append_images=[OTHER], lossless=True),
    "WebP animated and turned": encode(
        PICTURE, "WEBP", save_all=True, append_images=[OTHER], exif=exif_of(6)[4:], lossless=True
    ),
    "BMP from above": top_down(encode(PICTURE, "BMP")),
    "BMP palette": encode(PICTURE.quantize(64), "BMP"),
    "TIFF 32-bit integers": encode(Image.fromarray(GRAY.astype(np.int32)), "TIFF"),
    "TIFF floats": encode(Image.fromarray(GRAY.astype(np.float32)), "TIFF"),
    "TIFF of two pages": encode(PICTURE, "TIFF", save_all=True, append_images=[OTHER]),
    "PGM 16 bits": b"P5 %d %d 65535\n" % (WIDTH, HEIGHT) + (GRAY.astype(">u2") * 256 + 9).tobytes(),
    "256 scans": of_scans(256),
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


def thumbnailed_and_cut() -> bytes:
    """A thumbnail's end marker stands in the last KiB, the image's own is gone."""
    whole = headed(segment(0xE1, b"Exif\0\0" + exif_block("II", [[]]) + encode(draw(9, 9))))
    cut_at = whole.rindex(b"\xff\xda") + 60
    assert b"\xff\xd9" in whole[cut_at - 1024 : cut_at]
    return whole[:cut_at]


BASE = encode(PICTURE)
FRAME = frame_at(BASE)
BROKEN = {
    "truncated at 1%": cut(BASE, 0.01),
    "truncated at 50%": cut(BASE, 0.5),
    "truncated at 99%": cut(BASE, 0.99),
    "EOI missing": BASE[:-2],
    "EOI missing behind coded data that end with a byte": encode(draw(24, 40), restart_marker_blocks=3)[:-2],
    "progressive, truncated at 60%": cut(encode(PICTURE, progressive=True), 0.6),
    "cut behind a thumbnail's end": thumbnailed_and_cut(),
    "PNG, end chunk missing": encode(PICTURE, "PNG")[:-12],
    "zero length": b"",
    "garbage": bytes(np.random.default_rng(0).integers(0, 256, 4000, np.uint8)),
    "header only": BASE[: BASE.index(b"\xff\xda") + 2],
    "12 bits": patched(BASE, FRAME + 4, b"\x0c"),
    "257 scans": of_scans(257),
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
