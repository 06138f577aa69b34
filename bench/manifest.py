"""What does a manifest of ten million rows cost: on disk, to open, in memory, to resume from, and to check?"""

import hashlib
import io
import os
import tempfile
import time
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import harness
import numpy as np
from PIL import Image

from fastrot.data.index import index
from fastrot.data.manifest import Manifest, content_hash
from fastrot.data.order import FullOrder
from fastrot.data.plan import Plan
from fastrot.data.sources import open_source
from fastrot.data.storage import FileStorage

IMAGENET = 1_281_167
BATCH = 128  # images of the planned and the decoded batch
EPOCH = 17.7  # where the resumed run goes on


def tiny() -> bytes:
    """A JPEG of 64 x 48."""
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)).save(out, "JPEG")
    return out.getvalue()


def synthetic(rows: int, home: Path, one_file_each: bool) -> tuple[Path, dict]:
    """A saved manifest of rows that all show one small image: by one name, or by a made-up name each."""
    image = home / "image.jpg"
    image.write_bytes(tiny())
    columns = {name: np.full(rows, value, kind) for name, value, kind in (
        ("offset", 0, np.int64), ("length", image.stat().st_size, np.int64), ("height", 48, np.int32),
        ("width", 64, np.int32), ("kind", 1, np.uint8), ("orientation", 1, np.uint8), ("coding", 3, np.uint8),
    )}  # fmt: skip
    label = np.arange(rows) * 1000 // rows
    if one_file_each:
        name = b"/data/imagenet/train/n01440764/n01440764_00000000.JPEG"
        names, ends = np.tile(np.frombuffer(name, np.uint8), rows), np.arange(1, rows + 1) * len(name)
        file = np.arange(rows, dtype=np.int32)
    else:
        names, ends = np.frombuffer(os.fsencode(image), np.uint8), np.array([len(os.fsencode(image))])
        file = np.zeros(rows, np.int32)
    head = np.tile(np.frombuffer(hashlib.sha256(tiny()).digest(), np.uint8), (rows, 1))
    start = time.perf_counter()
    content = content_hash(columns["height"], columns["width"], label, columns["length"], head)
    hashing = time.perf_counter() - start
    made = Manifest(file, **columns, label=label, names=names, name_ends=ends, source="synthetic", classes=[],
                    content=content, storage="", skipped={}, quarantined=[])  # fmt: skip
    folder = home / "manifest"
    start = time.perf_counter()
    made.save(folder)
    return folder, {"content_hash_s": hashing, "save_s": time.perf_counter() - start}


def measure(folder: Path, rounds: int, decode: bool) -> dict:
    """In a process of its own: open a manifest, plan a batch deep in the stream, decode it."""
    from fastrot.data.decode.batch import Batch
    from fastrot.data.decode.torch import TorchDecoder

    before = harness.memory_mib()
    start = time.perf_counter()
    manifest = Manifest.load(folder)
    n = len(manifest)
    plan = Plan(0, manifest.height, manifest.width, FullOrder(n, 0))
    sample = plan.at(int(EPOCH * n), int(EPOCH * n) + BATCH)
    labels = manifest.label[sample.rows]
    planned = time.perf_counter() - start
    grown = {name: value - before[name] for name, value in harness.memory_mib().items()}
    result = {"rows": n, "first_planned_batch_s": planned, "memory_growth_mib": grown}
    assert len(labels) == BATCH
    if decode:
        storage, decoder = FileStorage(manifest), TorchDecoder(2)
        start = time.perf_counter()
        decoder.submit(Batch(storage.read(sample.rows), np.ones(BATCH, np.uint8), sample.windows, 64))
        pixels, failed = decoder.result()
        assert len(pixels) == BATCH and not failed
        result["first_decoded_batch_s"] = planned + time.perf_counter() - start
        storage.close()
        decoder.close()
    result["open"] = harness.timed(lambda: Manifest.load(folder), rounds)
    at = iter(range(int(EPOCH * n) + BATCH, 1 << 62, BATCH))
    result["plan_batch"] = harness.timed(lambda: plan.at(start := next(at), start + BATCH), rounds)
    return result


def in_a_process(work):
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(work)


def check_of_files(files: int, home: Path, rounds: int) -> dict:
    """Indexing a folder of real files (a small image, linked), and what a later start pays to see that none changed."""
    root, per_class = home / "folder", 1000
    for first in range(0, files, per_class):
        folder = root / f"{first // per_class:05d}"
        folder.mkdir(parents=True)
        (folder / "0.jpg").write_bytes(tiny())
        for i in range(1, min(per_class, files - first)):
            os.link(folder / "0.jpg", folder / f"{i}.jpg")
    again = partial(index, str(root), home / "cache", 10**8, _quiet)
    start = time.perf_counter()
    again()
    first = time.perf_counter() - start
    return {
        "files": files,
        "index_s": first,
        "start_unchanged": harness.timed(again, rounds),
        "of_it_listing": harness.timed(lambda: open_source(str(root), _quiet), rounds),
        "start_frozen": harness.timed(partial(Manifest.load, again()), rounds),
    }


def _quiet(items, total, title):
    return items


def main() -> None:
    options = harness.parser(__doc__)
    options.add_argument("--rows", type=int, nargs="+", default=[IMAGENET, 10_000_000])
    options.add_argument("--files", type=int, default=100_000, help="real files to list and check")
    args = options.parse_args()
    result = {"facts": harness.facts(), "manifests": []}
    for rows in args.rows:
        for one_file_each in (False, True):
            with tempfile.TemporaryDirectory() as home:
                folder, made = synthetic(rows, Path(home), one_file_each)
                size = sum(path.stat().st_size for path in folder.iterdir())
                found = in_a_process(partial(measure, folder, args.rounds, not one_file_each))
                names = "one a row" if one_file_each else "one for all rows, as in a shard"
                result["manifests"].append({"file_names": names, "bytes": size} | made | found)
    with tempfile.TemporaryDirectory() as home:
        result["check"] = check_of_files(args.files, Path(home), args.rounds)
    harness.write(args.out, __doc__, result)


if __name__ == "__main__":
    main()
