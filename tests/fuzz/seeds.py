"""What fuzzing begins with: small valid files of each kind, {parser: [bytes]}."""

import io
import json
import tarfile

from PIL import Image

from conftest import draw
from corpus import FAULTS, encode, exif_of, headed, of_scans
from fastrot.data import beton
from fastrot.profiling import hardware

SMALL = draw(24, 40)
MOST = 1 << 14  # bytes; mutations of larger ones seldom hit what matters


def jpegs() -> list[bytes]:
    ways = [{"subsampling": n} for n in range(3)] + [{"progressive": True}, {"restart_marker_blocks": 2}]
    ways += [{"quality": 8}, {"optimize": True}, {"quality": 100, "subsampling": 0}, {"keep_rgb": True}]
    made = [_jpeg(SMALL, **way) for way in ways]
    return [*made, _jpeg(SMALL.convert("L")), headed(exif_of(6), picture=SMALL), of_scans(3)]


def journals() -> list[bytes]:
    """Of a turned file, and of a copy; neither is there."""
    header = b'{"journal": "fastrot orient", "version": 1, "folder": "/nowhere"}\n'
    replaced, copied = (b'{"file": "x.jpg", "before": %s, "after": "bb"}\n' % before for before in (b'"aa"', b"null"))
    return [header, header + replaced, header + copied, header + replaced + copied]


def _jpeg(image: Image.Image, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", **({"quality": 80} | options))
    return out.getvalue()


def images() -> list[bytes]:
    kinds = ("PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
    made = [encode(SMALL.quantize(16) if kind == "GIF" else SMALL, kind) for kind in kinds]
    return [*jpegs(), *made, *(data for data in FAULTS.values() if len(data) <= MOST)]


def windows() -> list[bytes]:
    """A request, and its file: cropped, boxed, scaled in the DCT, and of pixels."""
    asked = [(31, 0, 0, 2, 3, 20, 30), (15, 5, 3, 9, 9, 20, 20), (7, 6, 2, 0, 0, 40, 24), (8, 0, 12, 0, 0, 8, 9)]
    return [bytes((*words, 12, 20, 0, 0, 0)) + data for words in asked for data in [*jpegs(), SMALL.tobytes()]]


def places() -> list[bytes]:
    return [place + data for place in (b"\0\0\xff\xff", b"\x40\x40\x80\x80") for data in jpegs()]


def stretches() -> list[bytes]:
    return [bytes((0, 10, 1, 0, 0, 0, 1, 0)) * n for n in (1, 3, 8)] + [bytes(8), bytes((3, 200, 0, 32, 1, 1, 2, 0))]


def shards() -> list[bytes]:
    formats = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    return [_shard(form, long) for form in formats for long in ("k", "k" * 70 + "/" + "k" * 70, "\u00e9" * 40)]


def _shard(form: int, key: str) -> bytes:
    out, small = io.BytesIO(), b"\xff\xd8\xff\xd9"
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, content in (
            (f"{key}.jpg", small),
            (f"{key}.cls", b"3"),
            ("b.jpg", small),
            ("b.json", b'{"label": 4}'),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("c.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "b.jpg"
        tar.addfile(link)
    return out.getvalue()[:-9000]


def betons() -> list[bytes]:
    """As our writer makes them, without the zeros up to a page; with and without its checksums."""
    out = io.BytesIO()
    writer = beton.Writer(out, 2, 1 << 21)
    start = writer._end = 24 + 2 * 1041 + 2 * 24
    out.seek(start)
    writer.add(b"\xff\xd8\xff\xd9", beton.JPEG, 4, 6, 1)
    writer.add(bytes(12), beton.RAW, 2, 2, 0)
    writer.finish()
    ours = out.getvalue()
    return [ours, ours.replace(b"fastrot crc32 1", bytes(15))]


def configs() -> list[bytes]:
    words = b"\0optim.lr=0.1\ndata.scale=[0.3, 1]\nmodel.arch=resnet18\nrun.loggers=[wandb]\ndata.train=/a: b"
    return [
        b"data:\n  train: /a\n  scale: [0.35, 1.0]\noptim: {lr: 1e-4, epochs: 2.5}\n",
        b"run: {loggers: [wandb], seed: 3}\n",
        words,
    ]


def machines() -> list[bytes]:
    """Each number once, then by its anchor: YAML's own parser takes most of the time."""
    known, *others = [
        name for name, field in hardware.Hardware.model_fields.items() if field.annotation is hardware.Known
    ]
    one = f"{known}: &k {{value: 2, low: 1.5, high: 3e9, source: assumed}}\n"
    rest = "".join(f"{name}: *k\n" for name in others)
    return [f"name: a\ndevice: b\ngpus: 8\ncores: 9\ngpu_memory_gib: 8\n{one}{rest}".encode()]


def suites() -> list[bytes]:
    return [
        b"sets:\n  - {name: a, train: /a, test: /b}\nruns:\n  - {name: c, task: linear, train: /a, test: /b, grid: {optim.lr: [1, 2]}}\n"
    ]


def annotations() -> list[bytes]:
    one = "<object><name>cat</name><difficult>0</difficult><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>8</ymax></bndbox></object>"
    whole = f"<annotation><size><width>30</width><height>20</height></size>{one}</annotation>"
    return [
        text.encode()
        for text in (whole, '<?xml version="1.0" encoding="utf-8"?><!DOCTYPE a [<!ENTITY b "c">]>' + whole)
    ]


def cocos() -> list[bytes]:
    annotation = {"id": 1, "image_id": 1, "category_id": 2, "bbox": [1, 2, 3, 4], "segmentation": [[1, 2, 3, 4, 5, 6]]}
    rle = annotation | {"id": 2, "iscrowd": 1, "segmentation": {"size": [3, 4], "counts": [12]}}
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 3, "width": 4}],
        "annotations": [annotation, rle],
        "categories": [{"id": 2, "name": "cat"}],
    }
    return [json.dumps(content).encode()]


def profiles() -> list[bytes]:
    size = {"images": 8, "step_s": 0.1, "low": 0.1, "high": 0.2, "cpu_s": 0.1}
    machine, network = {"device": "a", "cores": 2}, {"model.arch": "resnet50"}
    made = {
        "network": network,
        "machine": machine,
        "steps": [size, size],
        "steps_over_ranks": [size, size],
        "collectives": [],
    }
    stages = {"data": {"cpu_s": 0.1, "pace": 9.0}, "both": {"paces": [8.0, 9.0]}}
    both = {"step_s": 0.1, "wait_share": 0.1, "communicate_share": 0.0}
    return [json.dumps({"elsewhere": made, "stages": stages, "parts_of_a_step": {"both": both}}).encode()]
