"""`fastrot pack`: any source as one FFCV file, rows in their order."""

import os
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, BinaryIO

from fastrot import machine, terminal
from fastrot.config import Data
from fastrot.data import beton
from fastrot.data.bad_images import BadImages
from fastrot.data.encode import Encoding, Sample, encode_rows, start_worker
from fastrot.data.index import in_cache
from fastrot.data.manifest import Manifest
from fastrot.errors import Fault, Unreadable, UserError
from fastrot.files import replacing

_BLOCK = 32  # rows a task
_AHEAD = 4  # tasks a worker: what waits in memory to be written


def pack(source: str, out: str, encoding: Encoding, workers: int | None, data: Data) -> dict[str, Any]:
    """Write `source` to the new file `out` and read it back; what was written, for a person and for JSON.

    Rows that cannot be decoded are left out and listed, up to data.max_bad of them.
    Raises UserError where the file cannot be written so; Fault where a worker dies, the disk fails,
    or what is read back is not what was written.
    """
    encoding.check()
    path = Path(out)
    if path.suffix != ".beton":
        raise UserError(f"{out}: a packed file's name ends in .beton")
    if path.exists():
        raise UserError(f"{out}: exists; remove it or name another")
    if not path.parent.is_dir():
        raise UserError(f"{out}: no such folder {path.parent}; make it first")
    folder = in_cache(source, data.max_pixels, "SOURCE")
    manifest = Manifest.load(folder)
    if manifest.label.ndim != 1:
        raise UserError(f"{source}: has several labels an image; a .beton holds one int")
    page = beton.page_for(encoding.largest(manifest))
    most = data.max_bad if data.max_bad is not None else max(10, len(manifest) // 1000)
    try:
        with replacing(path) as scratch:
            with scratch.open("wb") as file:
                result = _write(file, manifest, folder, encoding, workers or machine.cores(), page, most, data.timeout)
                file.flush()
                os.fsync(file.fileno())  # read back from the disk, not from memory
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            _read_back(scratch)
    except PermissionError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); name a folder of yours") from None
    except OSError as error:
        raise Fault(f"{out}: cannot be written ({error.strerror})") from None
    result = {"out": out, **result, "source": source, "content": manifest.content}
    _show(result)
    return result


def _write(
    file: BinaryIO,
    manifest: Manifest,
    folder: Path,
    encoding: Encoding,
    workers: int,
    page: int,
    most: int,
    timeout: float,
) -> dict[str, Any]:
    n = len(manifest)
    writer = beton.Writer(file, n, page)
    bad = BadImages(None, manifest.source, most)
    counts = dict.fromkeys(("kept", "encoded", "raw"), 0)
    left_out = []
    pool = ProcessPoolExecutor(workers, get_context("forkserver"), start_worker, (folder, encoding))
    try:
        blocks = [range(at, min(at + _BLOCK, n)) for at in range(0, n, _BLOCK)]
        samples = _ahead(pool, blocks, workers * _AHEAD, timeout)
        title = f"packing {manifest.source}"
        for row, sample in enumerate(terminal.track(samples, n, title, lambda: f"{writer.bytes_written / 1e9:.2f} GB")):
            if isinstance(sample, str):
                left_out.append([manifest.name(row), sample])
                bad.add(manifest.name(row), row, sample)
                continue
            writer.add(sample.data, sample.mode, sample.height, sample.width, int(manifest.label[row]))
            counts["raw" if sample.mode == beton.RAW else "kept" if sample.kept else "encoded"] += 1
    except BrokenProcessPool:
        raise Fault("a packing worker died (killed, or out of memory?); fewer --workers need less memory") from None
    except Unreadable as error:
        raise Fault(f"{error}; nothing is packed: mend it and start again") from None
    except TimeoutError:
        for worker in active_children():  # else the exit waits for them
            worker.kill()
        raise Fault(f"{manifest.source}: its workers gave nothing for data.timeout {timeout:g} s") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    if len(left_out) == n:
        raise UserError(
            f"{manifest.source}: none of its {n} images can be decoded; the first: {': '.join(left_out[0])}"
        )
    writer.finish()
    return {"rows": n - len(left_out), "bytes": file.seek(0, os.SEEK_END), "page": page, **counts, "left_out": left_out}


def _ahead(pool: ProcessPoolExecutor, blocks: list[range], most: int, timeout: float) -> Iterator[Sample | str]:
    """The samples in order, at most `most` blocks in work or waiting. Raises TimeoutError, BrokenProcessPool."""
    flying: deque[Future[list[Sample | str]]] = deque()
    for block in blocks:
        flying.append(pool.submit(encode_rows, block))
        if len(flying) == most:
            yield from flying.popleft().result(timeout)
    while flying:
        yield from flying.popleft().result(timeout)


def _read_back(path: Path) -> None:
    """Raises Fault where the file does not hold what was written into it."""
    table = beton.read_table(path)
    assert table.checksum is not None, "this file is ours"
    with path.open("rb") as file:
        for at in terminal.track(range(len(table.offset)), len(table.offset), "reading it back"):
            file.seek(int(table.offset[at]))
            if zlib.crc32(file.read(int(table.length[at]))) != table.checksum[at]:
                raise Fault(f"{path.name}: sample {at} is not read back as it was written; is the disk sound?")


def _show(r: dict[str, Any]) -> None:
    terminal.table(
        r["out"],
        [
            ("images", f"{r['rows']:,} in {r['bytes'] / 1e9:.3f} GB"),
            ("JPEG bytes kept", f"{r['kept']:,}"),
            ("encoded anew", f"{r['encoded']:,}"),
            ("raw pixels", f"{r['raw']:,}"),
            ("left out", f"{len(r['left_out']):,}"),
            *((place, reason) for place, reason in r["left_out"][:10]),
        ],
    )
