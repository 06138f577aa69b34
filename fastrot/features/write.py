"""Writing a feature store (read.py reads it): whole, or resumable.

DIR/feature1.npy ..  [N, D] of the dtype asked for, C order, to be memory-mapped; N = passes * images,
                     row p * images + r is image r in pass p
DIR/labels.npy       int64 [N], or int8 [N, classes] where an image has many
DIR/rows/            the manifest of the images: paths, sizes, classes
DIR/manifest.json    what was computed from what, and sha256 and bytes of every .npy; written last
While it is made: plan.json in place of manifest.json, and progress-<rank>.txt with a line a finished block.
"""

import json
import os
import queue
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrot.data.manifest import Manifest
from fastrot.errors import Fault, UserError
from fastrot.features.read import BFLOAT16, DTYPES, mapped
from fastrot.files import Sealed, read_json, write_text

_DONE = re.compile(r"block (\d+) of (\d+) rows is on disk")
_COMMIT_S = 1.0  # between two fsyncs: what a kill may cost
_AHEAD = 3  # blocks that wait to be written
_Arrays = Callable[[], dict[str, NDArray[Any]]]


def differences(folder: Path, facts: dict[str, Any]) -> list[str]:
    """What a store in `folder`, finished or not, was made from that is not in `facts`: names of the facts.

    Raises UserError where what it says of itself is damaged.
    """
    for name in ("manifest.json", "plan.json"):
        if (folder / name).exists():
            try:
                there = read_json(folder / name, dict[str, Any])
            except ValueError as error:
                raise _damaged(folder, f"{name} cannot be read ({error})") from None
            return [key for key in facts if there.get(key) != facts[key]]
    return []


def prepare(folder: Path, facts: dict[str, Any], manifest: Manifest) -> bool:
    """Lay out a store for every row of `manifest`, or take up one that was begun; whether it is finished.

    facts  "taps": {name: {"width": D, ...}}, "dtype", "passes": {"count": P, ...} or None for one, and whatever
           else a resume must find unchanged.
    Raises UserError where the folder holds other features or has no space.
    """
    passes = facts["passes"]["count"] if facts["passes"] else 1
    try:
        folder.mkdir(parents=True, exist_ok=True)
        other = differences(folder, facts)
        if other:
            raise UserError(f"--out {folder}: holds features of another {', '.join(other)}; name another folder")
        if (folder / "manifest.json").exists():
            _refuse_damage(folder)
            _clear(folder)
            return True
        if not (folder / "plan.json").exists():
            if (folder / "labels.npy").exists():  # ours come after the plan
                raise UserError(f"--out {folder}: holds features that this command did not begin; name another folder")
            for stale in folder.glob("progress-*.txt"):
                stale.unlink()
            for name, tap in facts["taps"].items():
                _allocate(folder / f"{name}.npy", (passes * len(manifest), tap["width"]), DTYPES[facts["dtype"]])
            manifest.save(folder / "rows")
            write_text(folder / "plan.json", json.dumps(facts, indent=1) + "\n")
        else:
            for name, tap in facts["taps"].items():
                _refuse_other_array(folder, name, (passes * len(manifest), tap["width"]), DTYPES[facts["dtype"]])
        np.save(folder / "labels.npy", np.concatenate([manifest.label] * passes), allow_pickle=False)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror})") from None
    return False


def _damaged(folder: Path, what: str) -> UserError:
    return UserError(f"--out {folder}: a damaged store: {what}; remove it, or name another folder")


@dataclass(frozen=True)
class _Finished:
    """Of manifest.json, what a finished store is checked by."""

    taps: dict[str, Any]
    files: dict[str, Sealed]


def _refuse_damage(folder: Path) -> None:
    """Raises UserError where a finished store's arrays are not all there with the bytes its manifest counts."""
    try:
        manifest = read_json(folder / "manifest.json", _Finished)
    except ValueError as error:
        raise _damaged(folder, f"manifest.json cannot be read ({error})") from None
    for name in (*(f"{tap}.npy" for tap in manifest.taps), "labels.npy"):
        entry, path = manifest.files.get(name), folder / name
        if entry is None:
            raise _damaged(folder, f"manifest.json lacks {name}")
        if not path.is_file():
            raise _damaged(folder, f"{name} is gone")
        if path.stat().st_size != entry.bytes:
            raise _damaged(folder, f"{name} has {path.stat().st_size:,} bytes, not {entry.bytes:,}")


def _refuse_other_array(folder: Path, tap: str, shape: tuple[int, int], dtype: np.dtype) -> None:
    """Raises UserError where a begun store's array is not as it was laid out."""
    path = folder / f"{tap}.npy"
    if not path.is_file():
        raise _damaged(folder, f"{path.name} is gone")
    array = mapped(path)
    if array.shape != shape or array.dtype != dtype:
        raise _damaged(folder, f"{path.name} is {array.dtype} {list(array.shape)}, not {dtype} {list(shape)}")


def _allocate(path: Path, shape: tuple[int, int], dtype: np.dtype) -> None:
    """An .npy whose space is taken, so that a full disk is found before the work."""
    held = np.dtype("V2") if dtype == BFLOAT16 else dtype
    np.lib.format.open_memmap(path, mode="w+", dtype=held, shape=shape)
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, os.fstat(file.fileno()).st_size))


def finished_blocks(folder: Path, block: int) -> set[int]:
    """Numbers of the blocks of `block` rows that any rank has put on disk."""
    done = set()
    for path in folder.glob("progress-*.txt"):
        for line in path.read_text().splitlines():
            match = _DONE.fullmatch(line)
            if match and int(match[2]) == block:
                done.add(int(match[1]))
    return done


class BlockWriter:
    """Writes blocks of rows beside the computation: a thread, which records a block only once it is on disk.

    block  rows of a block; block i begins at row i * block.
    """

    def __init__(self, folder: Path, taps: list[str], block: int, rank: int):
        self._block = block
        self._files: dict[str, tuple[int, int, np.dtype[Any], int]] = {}  # handle, offset, dtype, bytes a row
        for tap in taps:
            array = mapped(folder / f"{tap}.npy")
            handle = os.open(folder / f"{tap}.npy", os.O_WRONLY)
            self._files[tap] = (handle, array.offset, array.dtype, array.shape[1] * array.dtype.itemsize)
        self._progress = os.open(folder / f"progress-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(self._progress, b"\n")  # ends the half line that a kill may have left
        self._folder = folder
        self._error: BaseException | None = None
        self._queue: queue.Queue[tuple[int, _Arrays] | None] = queue.Queue(_AHEAD)
        self._thread = threading.Thread(target=self._write_all, name="features", daemon=True)
        self._thread.start()

    def put(self, number: int, arrays: _Arrays) -> None:
        """Hand over a block; `arrays()`, called by the thread, gives [n, D] of each tap once it is computed.

        Raises what went wrong with an earlier block.
        """
        while self._error is None:
            try:
                return self._queue.put((number, arrays), timeout=0.1)
            except queue.Full:
                continue
        raise self._error

    def close(self) -> None:
        """Wait until all is on disk. Raises what went wrong."""
        if self._error is None:
            self._queue.put(None)
        self._thread.join()
        for handle, *_ in self._files.values():
            os.close(handle)
        os.close(self._progress)
        if self._error is not None:
            raise self._error

    def _write_all(self) -> None:
        written, committed = [], time.monotonic()
        try:
            while (item := self._queue.get()) is not None:
                number, arrays = item
                for tap, array in arrays().items():
                    self._write(tap, number, array)
                written.append(number)
                if time.monotonic() - committed > _COMMIT_S:
                    written, committed = self._commit(written), time.monotonic()
            self._commit(written)
        except OSError as error:
            self._error = Fault(f"{self._folder}: cannot be written ({error.strerror}); the same command goes on")
        except BaseException as error:  # carried to the thread that computes, which raises it
            self._error = error

    def _write(self, tap: str, number: int, array: NDArray[Any]) -> None:
        handle, offset, dtype, stride = self._files[tap]
        with np.errstate(over="ignore"):
            rows = np.ascontiguousarray(array.astype(dtype, copy=False))
        if not np.isfinite(rows).all():
            what = f"overflow {dtype}; use --dtype float32" if np.isfinite(array).all() else "are not finite"
            raise UserError(f"{tap}: features of rows from {number * self._block} on {what}")
        view, at = memoryview(rows.view(np.uint8)).cast("B"), offset + number * self._block * stride
        while view:
            count = os.pwrite(handle, view, at)
            view, at = view[count:], at + count

    def _commit(self, numbers: list[int]) -> list[int]:
        for handle, *_ in self._files.values():
            os.fsync(handle)
        lines = "".join(f"block {number} of {self._block} rows is on disk\n" for number in numbers)
        os.write(self._progress, lines.encode())
        os.fsync(self._progress)
        return []


def finish(folder: Path, facts: dict[str, Any]) -> None:
    """Hash what was written and turn the plan into the manifest."""
    paths = sorted(folder.glob("*.npy"))
    with ThreadPoolExecutor(4) as pool:
        files = {path.name: asdict(seal) for path, seal in zip(paths, pool.map(Sealed.of, paths), strict=True)}
    write_text(folder / "manifest.json", json.dumps(facts | {"files": files}, indent=1) + "\n")
    _clear(folder)


def _clear(folder: Path) -> None:
    for left in (*folder.glob("progress-*.txt"), folder / "plan.json"):
        left.unlink(missing_ok=True)
