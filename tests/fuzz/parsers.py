"""Every parser that reads a user's bytes, one entry each: it reads them, or refuses them in a line that names the file.

`PARSERS[name].one(data)` raises where it does anything else; `seeds()` are valid files to begin with; `modules` begin the
names of those that read it, through which coverage leads. What is put in place of a file of a folder has a first byte
that says of which.
"""

import atexit
import io
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import TypeVar
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import save

import seeds
from fastrot.benchmark import compare
from fastrot.config import Config, load
from fastrot.data import beton, coco_json, jpeg, loader_settings, manifest, objects, pieces, png, reading
from fastrot.data.bad_images import BadImages
from fastrot.data.coding import coding_of
from fastrot.data.images import KINDS, UNKNOWN, kind_of, known
from fastrot.data.index import scan_file
from fastrot.data.sources import filelist, tar, voc
from fastrot.engine.deepspeed import merged
from fastrot.errors import Fault, UserError
from fastrot.features.read import open_store
from fastrot.files import Damaged
from fastrot.models.backbone import read_state
from fastrot.orient import coefficients, exif, journal
from fastrot.profiling import hardware
from fastrot.remote import Entry
from fastrot.report import suite
from fastrot.runs import checkpoint, elsewhere, epochs, loggers, overview
from fastrot.runs.log import cut_back, read_status

MOST_PIXELS = 1 << 16
STEP = "checkpoints/step-00000002"
T = TypeVar("T")


@dataclass(frozen=True)
class Parser:
    one: Callable[[bytes], object]
    seeds: Callable[[], list[bytes]]
    modules: tuple[str, ...]


@cache
def place() -> Path:
    """A folder in memory, which goes with this process, and with none that it forks."""
    made = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    here = os.getpid()
    atexit.register(lambda: shutil.rmtree(made, ignore_errors=True) if os.getpid() == here else None)
    return made


@cache
def opened(name: str) -> tuple[Path, int]:
    path = place() / name
    return path, os.open(path, os.O_WRONLY | os.O_CREAT)


def laid(name: str, data: bytes) -> Path:
    """A file of these bytes, over what was in it: to make one anew takes as long as to parse it."""
    path, handle = opened(name)
    if not os.fstat(handle).st_nlink:  # who read it last has removed it
        anew = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(anew, handle)
        os.close(anew)
    os.ftruncate(handle, 0)
    os.pwrite(handle, data, 0)
    return path


@contextmanager
def refused(name: object, lines: int = 1) -> Iterator[None]:
    """Passes what may be raised: so many lines at most, and the first names the file."""
    try:
        yield
    except (UserError, Fault) as error:
        said = str(error).split("\n")
        assert said[0] and len(said) <= lines and str(name) in said[0], str(error)


def of_file(name: str, read: Callable[[Path], object], lines: int = 1, names: str = "") -> Callable[[bytes], None]:
    """names: what a refusal names in place of the file."""

    def one(data: bytes) -> None:
        path = laid(name, data)
        with refused(names or path, lines):
            read(path)

    return one


@cache
def kept(read: Callable[[Path], T], path: Path) -> T:
    return read(path)


def afresh(name: str, module: ModuleType, function: str) -> AbstractContextManager[object]:
    """What a module reads by a function is read but once, since no input changes it, except for the file of this name."""
    read = getattr(module, function)
    return patch.object(module, function, lambda path: read(path) if path.name == name else kept(read, path))


def of_folder(make: Callable[[Path], object], reads: dict[str, Callable[[Path], object]], *modules: str) -> Parser:
    """One of a folder's files is any bytes, the others are as they should be; what reads the folder then."""
    names = list(reads)

    @cache
    def made(name: str) -> Path:
        folder = Path(tempfile.mkdtemp(dir=place())) / "a"
        make(folder)
        return folder

    def one(data: bytes) -> None:
        name = names[data[0] % len(names) if data else 0]
        folder = made(name)
        laid(f"{folder}/{name}", data[1:])
        with refused(folder):
            reads[name](folder)

    def begun() -> list[bytes]:
        whole = Path(tempfile.mkdtemp(dir=place())) / "a"
        make(whole)
        return [bytes([at]) + (whole / name).read_bytes() for at, name in enumerate(names)]

    return Parser(one, begun, modules)


def orientation_tag(data: bytes) -> None:
    """Set, and settled; and coefficients turned, of what is small: a bomb is no row that an answer speaks of."""
    kind = kind_of(data)
    if kind not in ("JPEG", "TIFF", "WEBP"):
        return
    with suppress(exif.Refused):
        exif.tagged(data, kind, 6)
    with suppress(exif.Refused):
        exif.settled(data, kind, quarter=True)
    frame = jpeg.frame_of(data) if kind == "JPEG" else None
    if frame and frame.height * frame.width <= MOST_PIXELS:
        with suppress(exif.Refused):
            coefficients.turned(data, 6, trim=True)


def undoing(data: bytes) -> None:
    book = laid("orient-journal.jsonl", data)
    with refused(book):
        journal.undo(book)


def jpeg_header(data: bytes) -> None:
    frame, file = jpeg.frame_of(data), io.BytesIO(data)
    assert frame is None or 0 < frame.data <= len(data)
    assert jpeg.frame_in(file) == frame
    if frame:
        jpeg.ends(file, frame)
        jpeg.too_many_scans(file, frame)
    for kind in KINDS:
        coding_of(kind, data)
    png.ends(data)


def image(data: bytes) -> None:
    path = laid("image", data)
    found = scan_file(bytes(path), 0, -1, (0, 0), MOST_PIXELS)
    if isinstance(found, str):
        assert len(found.splitlines()) == 1, found
        return
    height, width, kind, orientation, *_ = found
    assert 0 < height * width <= MOST_PIXELS and 1 <= orientation <= 8 and 0 <= kind < len(KINDS)
    assert known(UNKNOWN, np.frombuffer(data, np.uint8)) == orientation


def shard(data: bytes) -> None:
    path = laid("a.tar", data)
    with refused(path):
        rows, _, faults = tar._samples(bytes(path))
        assert (rows[:, :2] >= 0).all() and all(isinstance(word, str) for pair in faults for word in pair)


def samples(data: bytes) -> None:
    path = laid("a.beton", data)
    with refused(path):
        table = beton.read_table(path)
        assert (table.offset >= 0).all() and (table.length > 0).all()
        assert (table.offset + table.length <= len(data)).all()


def use_manifest(name: str, folder: Path) -> None:
    with afresh(name, manifest, "mapped"):
        loaded = manifest.Manifest.load(folder)
    assert all(len(getattr(loaded, name)) == len(loaded) for name in manifest.COLUMNS)


def config(data: bytes) -> None:
    """A file, or behind a zero byte the words of a command. What contradicts another key names the keys."""
    words = data[1:].decode("utf-8", "replace").split("\n") if data[:1] == b"\0" else []
    path = laid("config.yaml", b"" if words else data)
    with refused("", 999):
        load(str(path), words, "train" if len(data) % 2 else None)


def make_manifest(folder: Path) -> None:
    row = np.arange(3)
    manifest.Manifest(
        **{name: row.astype(kind) for name, kind in (("file", "i4"), ("offset", "i8"), ("length", "i8"))},
        **{name: row.astype("i4") + 9 for name in ("height", "width")},
        label=row,
        **{name: np.ones(3, np.uint8) for name in ("kind", "orientation", "coding")},
        names=np.frombuffer(b"/a/b/c", np.uint8),
        name_ends=np.array([2, 4, 6]),
        source="/a",
        classes=["one"],
        content="c",
        storage="s",
        skipped={"hidden": 1},
        quarantined=[["/d", "is none"]],
        file_state=np.ones((3, 2), np.int64),
    ).save(folder)


def columns() -> list[str]:
    make_manifest(place() / "columns")
    return sorted(path.name for path in (place() / "columns").iterdir())


def make_run(run: Path) -> None:
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("data: {train: /a}\n")
    (run / "STATUS.json").write_text(json.dumps({"state": "done", "steps": 2, "of": 2, "pid": 1, "host": "h"}))
    lines = [{"step": n, "epoch": n / 2, "loss": 1.5, "views_per_s": 9.0, "held_out_accuracy": 0.5} for n in range(2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    bad = {"path": "/a", "source": "d", "row": 1, "reason": "is truncated"}
    (run / "bad_images.jsonl").write_text(json.dumps(bad) + "\n")
    (run / "environment.json").write_text(json.dumps({"host": "h", "versions": {"torch": "2"}, "command": ["fastrot"]}))
    (run / "loggers.json").write_text(json.dumps({"wandb": "abc"}))
    (run / "stream.json").write_text(json.dumps({"epochs": [], "sha256": epochs._seal([])}))
    saver = checkpoint.Saver(run, 2, print)
    weights = {"conv1.weight": torch.ones(2, 3), "fc.weight": torch.ones(2, dtype=torch.bfloat16)}
    saver.save(weights, {"momentum_buffer/fc.weight": torch.ones(2)}, checkpoint.State(2, 16, {}, {}), 0.5)
    saver.finish()


def look_at(run: Path) -> None:
    cut_back(run / "metrics.jsonl", 10**9)
    read_status(run)
    one = overview.overview(run, "a")
    json.dumps(one.plain())
    overview.row(one)
    overview.compared(one, one)


def read_stream(run: Path) -> None:
    with suppress(Damaged):
        epochs.read(run)


def read_bad_images(run: Path) -> None:
    assert BadImages(run / "bad_images.jsonl", "d", 10**6).count >= 0


def load_checkpoint(name: str, run: Path) -> None:
    folder = run / STEP
    with afresh(name, checkpoint, "sha256_of"), afresh(name, checkpoint, "load_file"):
        assert len(checkpoint.verify(folder).splitlines()) <= 1
        checkpoint.load(folder)


def weights(data: bytes) -> None:
    of_file("a.pth" if data[:1] == b"\0" else "a.safetensors", read_state)(data[1:])


def weights_seeds() -> list[bytes]:
    out, other = io.BytesIO(), io.BytesIO()
    torch.save({"a": torch.ones(2), "b": {"c": torch.ones(1, dtype=torch.float16)}}, out)
    torch.save({"a": torch.ones(2)}, other, _use_new_zipfile_serialization=False)
    return [b"\1" + save({"a": torch.ones(2)}), b"\0" + out.getvalue(), b"\0" + other.getvalue()]


def read_list(path: Path) -> None:
    filelist.open_source(str(path))


def annotation(path: Path) -> None:
    objects._read_xml(path, 20, 30)


class _Far:
    """A store that has nothing to say."""


def take_up(path: Path) -> None:
    laid(".part-big", bytes(9))  # as it begins anew
    made = pieces.Pieces(_Far(), Entry("big", 9, version="v"), path.with_name("big"))  # type: ignore[arg-type]
    assert made.missing() in ([], [0])


def make_store(folder: Path) -> None:
    folder.mkdir()
    np.save(folder / "feature1.npy", np.ones((3, 4), np.float32))
    np.save(folder / "labels.npy", np.arange(3))
    (folder / "manifest.json").write_text(json.dumps({"classes": ["one"]}))


def use_store(name: str, folder: Path) -> None:
    with afresh(name, reading, "mapped"):
        open_store(folder)


def text(*some: str) -> Callable[[], list[bytes]]:
    return lambda: [one.encode() for one in some]


def merge(path: Path) -> None:
    merged({"zero_optimization": {"stage": 1}, "train_batch_size": 8}, str(path), {"train_batch_size": 8}, None)


YAML = ("fastrot.config",)  # PyYAML itself, instrumented, would take a hundred times as long
PARSERS = {
    "jpeg": Parser(jpeg_header, seeds.images, ("fastrot.data.jpeg", "fastrot.data.png", "fastrot.data.coding")),
    "orientation": Parser(orientation_tag, seeds.images, ("fastrot.orient", "fastrot.data.jpeg")),
    "undo": Parser(undoing, seeds.journals, ("fastrot.orient.journal",)),
    "image": Parser(
        image, seeds.images, ("fastrot.data.images", "fastrot.data.index", "fastrot.data.jpeg", "fastrot.data.png")
    ),
    "tar": Parser(shard, seeds.shards, ("fastrot.data.sources.tar", "tarfile")),
    "beton": Parser(samples, seeds.betons, ("fastrot.data.beton",)),
    "manifest": of_folder(
        make_manifest,
        {name: partial(use_manifest, name) for name in columns()},
        "fastrot.data.manifest",
        "numpy.lib._format_impl",
    ),
    "config": Parser(config, seeds.configs, YAML),
    "hardware": Parser(of_file("a.yaml", lambda path: hardware.read(str(path)), 99), seeds.machines, YAML),
    "suite": Parser(
        of_file("suite.yaml", lambda path: suite.load(str(path)), 99), seeds.suites, ("fastrot.report.suite", *YAML)
    ),
    "run": of_folder(
        make_run,
        {
            "STATUS.json": look_at,
            "metrics.jsonl": look_at,
            "bad_images.jsonl": read_bad_images,
            "stream.json": read_stream,
            "loggers.json": loggers._kept,
            "environment.json": look_at,
            "config.yaml": look_at,
            "checkpoints/best": checkpoint.find_best,
            f"{STEP}/state.json": checkpoint.find_best,
            f"{STEP}/manifest.json": checkpoint.find_best,
        },
        "fastrot.runs",
        "fastrot.data.bad_images",
    ),
    "checkpoint": of_folder(
        make_run,
        {f"{STEP}/{name}": partial(load_checkpoint, name) for name in sorted(checkpoint._FILES)},
        "fastrot.runs.checkpoint",
        "safetensors",
    ),
    "weights": Parser(
        weights, weights_seeds, ("fastrot.models.backbone", "safetensors", "torch.serialization", "torch._weights_only")
    ),
    "list": Parser(
        of_file("a.txt", read_list, 1, str(place().parent)),
        text("a.tar\t1\n\nb\tcat\n", "a.txt\n", "a.txt\t-3\n"),
        ("fastrot.data.sources.filelist",),
    ),
    "voc": Parser(
        of_file("cat_train.txt", lambda path: voc._read(str(path))),
        text("a 1\nb -1\n", "2007_01  0\n"),
        ("fastrot.data.sources.voc",),
    ),
    "xml": Parser(of_file("a.xml", annotation), seeds.annotations, ("fastrot.data.objects",)),
    "coco": Parser(of_file("a.json", coco_json.read_coco), seeds.cocos, ("fastrot.data.coco_json", "json")),
    "tuned": Parser(
        of_file("tuned.json", loader_settings.read),
        text('{"threads": 2, "prefetch": 3, "hw_decoder_load": 0.5, "found": "here"}'),
        ("fastrot.data.loader_settings", "json"),
    ),
    "deepspeed": Parser(
        of_file("ds.json", merge, 99, "--deepspeed_config"),
        text('{"zero_optimization": {"stage": 2}, "fp16": {"enabled": false}}', '{"train_batch_size": 4, "a": 1}'),
        ("fastrot.engine.deepspeed", "json"),
    ),
    "profile": Parser(
        of_file("p.json", lambda path: elsewhere.profiled(path, Config()), 99),
        seeds.profiles,
        ("fastrot.runs.elsewhere", "json"),
    ),
    "bundle": Parser(
        of_file("b.json", compare.read), text('{"rounds": [], "figures": {}}'), ("fastrot.benchmark.compare", "json")
    ),
    "pieces": Parser(
        of_file(".part-big.done", take_up, 1, "big"),
        text(f"9 'v'\n0 {zlib.crc32(bytes(9))}\n", "9 'v'\n0 123\n", "9 'v'\n"),
        ("fastrot.data.pieces",),
    ),
    "features": of_folder(
        make_store,
        {name: partial(use_store, name) for name in ("feature1.npy", "labels.npy", "manifest.json")},
        "fastrot.features.read",
        "fastrot.data.reading",
        "numpy.lib._format_impl",
    ),
}
