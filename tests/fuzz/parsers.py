"""Every parser that reads a user's bytes, one entry each: it reads them, or refuses them in a line that names the file.

`PARSERS[name].one(data)` raises where it does anything else; `seeds()` are valid files to begin with. What is put in
place of a file of a folder has a first byte that says of which.
"""

import atexit
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

import seeds
from fastrot.benchmark import compare
from fastrot.config import Config, load
from fastrot.data import beton, coco_json, jpeg, loader_settings, objects, pieces, png
from fastrot.data.bad_images import BadImages
from fastrot.data.coding import coding_of
from fastrot.data.images import KINDS, UNKNOWN, kind_of, known
from fastrot.data.index import scan_file
from fastrot.data.manifest import COLUMNS, Manifest
from fastrot.data.sources import filelist, tar, voc
from fastrot.engine.deepspeed import merged
from fastrot.errors import Fault, UserError
from fastrot.features.read import open_store
from fastrot.files import Damaged
from fastrot.models.backbone import read_state
from fastrot.orient import coefficients, exif, journal
from fastrot.profiling import hardware
from fastrot.report import suite
from fastrot.runs import checkpoint, elsewhere, epochs, loggers, overview
from fastrot.runs.log import cut_back, read_status

MOST_PIXELS = 1 << 18


@dataclass(frozen=True)
class Parser:
    one: Callable[[bytes], object]
    seeds: Callable[[], list[bytes]]


@cache
def place() -> Path:
    """A folder in memory, which goes with this process."""
    made = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


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
        path = place() / name
        path.write_bytes(data)
        with refused(names or path, lines):
            read(path)

    return one


def of_folder(make: Callable[[], Path], names: list[str], read: Callable[[Path], object]) -> Parser:
    """One of a folder's files is any bytes, the others are as they should be."""
    made = cache(make)

    def one(data: bytes) -> None:
        path = made() / names[data[0] % len(names) if data else 0]
        kept = path.read_bytes()
        try:
            path.write_bytes(data[1:])
            with refused(made()):
                read(made())
        finally:
            path.write_bytes(kept)

    return Parser(one, lambda: [bytes([at]) + (made() / name).read_bytes() for at, name in enumerate(names)])


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
    book = place() / "orient-journal.jsonl"
    book.write_bytes(data)
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
    path = place() / "image"
    path.write_bytes(data)
    found = scan_file(bytes(path), 0, -1, (0, 0), MOST_PIXELS)
    if isinstance(found, str):
        assert len(found.splitlines()) == 1, found
        return
    height, width, kind, orientation, *_ = found
    assert 0 < height * width <= MOST_PIXELS and 1 <= orientation <= 8 and 0 <= kind < len(KINDS)
    assert known(UNKNOWN, np.frombuffer(data, np.uint8)) == orientation


def shard(data: bytes) -> None:
    path = place() / "a.tar"
    path.write_bytes(data)
    with refused(path):
        rows, _, faults = tar._samples(bytes(path))
        assert (rows[:, :2] >= 0).all() and all(isinstance(word, str) for pair in faults for word in pair)


def samples(data: bytes) -> None:
    path = place() / "a.beton"
    path.write_bytes(data)
    with refused(path):
        table = beton.read_table(path)
        assert (table.offset >= 0).all() and (table.length > 0).all()
        assert (table.offset + table.length <= len(data)).all()


def use_manifest(folder: Path) -> None:
    manifest = Manifest.load(folder)
    assert all(len(getattr(manifest, name)) == len(manifest) for name in COLUMNS)


def config(data: bytes) -> None:
    """A file, or behind a zero byte the words of a command. What contradicts another key names the keys."""
    path = place() / "config.yaml"
    words = data[1:].decode("utf-8", "replace").split("\n") if data[:1] == b"\0" else []
    path.write_bytes(b"" if words else data)
    with refused("", 999):
        load(str(path), words)


def make_manifest(folder: Path) -> Path:
    row = np.arange(3)
    Manifest(
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
    return folder


def columns() -> list[str]:
    return sorted(path.name for path in make_manifest(place() / "columns").iterdir())


@cache
def make_run() -> Path:
    run = place() / "run"
    (run / "checkpoints").mkdir(parents=True)
    make_manifest(run / "manifest" / "train")
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
    return run


def look_at_run(run: Path) -> None:
    cut_back(run / "metrics.jsonl", 10**9)
    read_status(run)
    one = overview.overview(run, "a")
    json.dumps(one.plain())
    overview.row(one)
    overview.compared(one, one)
    with suppress(Damaged):
        epochs.read(run)
    loggers._kept(run)
    listed = BadImages(run / "bad_images.jsonl", "d", 10**6)
    assert listed.count >= 0
    checkpoint.find_best(run)


def load_checkpoint(run: Path) -> None:
    folder = run / "checkpoints" / "step-00000002"
    assert len(checkpoint.verify(folder).splitlines()) <= 1
    checkpoint.load(folder)


def weights(data: bytes) -> None:
    of_file("a.pth" if data[:1] == b"\0" else "a.safetensors", read_state)(data[1:])


def weights_seeds() -> list[bytes]:
    make_run()
    out, other = io.BytesIO(), io.BytesIO()
    torch.save({"a": torch.ones(2), "b": {"c": torch.ones(1, dtype=torch.float16)}}, out)
    torch.save({"a": torch.ones(2)}, other, _use_new_zipfile_serialization=False)
    plain = (make_run() / "checkpoints" / "step-00000002" / "model.safetensors").read_bytes()
    return [b"\1" + plain, b"\0" + out.getvalue(), b"\0" + other.getvalue()]


def read_list(path: Path) -> None:
    filelist.open_source(str(path))


def annotation(path: Path) -> None:
    objects._read_xml(path, 20, 30)


class _Far:
    """A store that has nothing to say."""


def take_up(path: Path) -> None:
    from fastrot.remote import Entry

    target = path.with_name("big")
    shutil.copy(path, target.with_name(".part-big.done"))
    target.with_name(".part-big").write_bytes(b"a" * 9)
    made = pieces.Pieces(_Far(), Entry("big", 9, version="v"), target)  # type: ignore[arg-type]
    assert made.missing() in ([], [0])


def make_store() -> Path:
    folder = place() / "store"
    folder.mkdir()
    np.save(folder / "feature1.npy", np.ones((3, 4), np.float32))
    np.save(folder / "labels.npy", np.arange(3))
    (folder / "manifest.json").write_text(json.dumps({"classes": ["one"]}))
    return folder


def text(*some: str) -> Callable[[], list[bytes]]:
    return lambda: [one.encode() for one in some]


def merge(path: Path) -> None:
    merged({"zero_optimization": {"stage": 1}, "train_batch_size": 8}, str(path), {"train_batch_size": 8}, None)


MANIFEST = columns()
PARSERS = {
    "jpeg": Parser(jpeg_header, seeds.images),
    "orientation": Parser(orientation_tag, seeds.images),
    "undo": Parser(undoing, seeds.journals),
    "image": Parser(image, seeds.images),
    "tar": Parser(shard, seeds.shards),
    "beton": Parser(samples, seeds.betons),
    "manifest": of_folder(partial(make_manifest, place() / "manifest"), MANIFEST, use_manifest),
    "config": Parser(config, seeds.configs),
    "hardware": Parser(of_file("a.yaml", lambda path: hardware.read(str(path)), 99), seeds.machines),
    "suite": Parser(of_file("suite.yaml", lambda path: suite.load(str(path)), 99), seeds.suites),
    "run": of_folder(
        make_run,
        [
            "STATUS.json",
            "metrics.jsonl",
            "bad_images.jsonl",
            "stream.json",
            "loggers.json",
            "environment.json",
            "config.yaml",
            "checkpoints/best",
            "checkpoints/step-00000002/state.json",
            "checkpoints/step-00000002/manifest.json",
        ],
        look_at_run,
    ),
    "checkpoint": of_folder(
        make_run, [f"checkpoints/step-00000002/{name}" for name in sorted(checkpoint._FILES)], load_checkpoint
    ),
    "weights": Parser(weights, weights_seeds),
    "list": Parser(
        of_file("a.txt", read_list, 1, str(place().parent)), text("a.tar\t1\n\nb\tcat\n", "a.txt\n", "a.txt\t-3\n")
    ),
    "voc": Parser(of_file("cat_train.txt", lambda path: voc._read(str(path))), text("a 1\nb -1\n", "2007_01  0\n")),
    "xml": Parser(of_file("a.xml", annotation), seeds.annotations),
    "coco": Parser(of_file("a.json", coco_json.read_coco), seeds.cocos),
    "tuned": Parser(
        of_file("tuned.json", loader_settings.read),
        text('{"threads": 2, "prefetch": 3, "hw_decoder_load": 0.5, "found": "here"}'),
    ),
    "deepspeed": Parser(
        of_file("ds.json", merge, 99, "--deepspeed_config"),
        text('{"zero_optimization": {"stage": 2}, "fp16": {"enabled": false}}', '{"train_batch_size": 4, "a": 1}'),
    ),
    "profile": Parser(of_file("p.json", lambda path: elsewhere.profiled(path, Config()), 99), seeds.profiles),
    "bundle": Parser(of_file("b.json", compare.read), text('{"rounds": [], "figures": {}}')),
    "pieces": Parser(of_file("pieces", take_up), text("9 'v'\n0 123\n", "9 'v'\n")),
    "features": of_folder(make_store, ["feature1.npy", "labels.npy", "manifest.json"], open_store),
}
