"""Where the images lie and how large they are: one row an image, arrays mapped from disk.

On disk a manifest is a folder: `<column>.npy` for each column, `names.npy` (uint8, all paths end to
end), `name_ends.npy` (int64), `file_state.npy` (int64, of files; older ones lack it), `meta.json` (hashes, classes,
what was left out). Nothing is pickled.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrot.data.images import UNKNOWN
from fastrot.data.reading import GONE, mapped, states
from fastrot.errors import UserError
from fastrot.files import Damaged, Sealed, as_words, read_json, replacing

FORMAT = 5  # 4 held no coding, 3 no orientation
_AT_ONCE = 1 << 16  # rows
HEAD = 4096  # bytes of an image that enter the content hash
COLUMNS = ("file", "offset", "length", "height", "width", "label", "kind", "orientation", "coding")
_LATE = ("orientation", "coding", "file_state")  # not in manifests of formats that held none


@dataclass(frozen=True)
class Manifest:
    """The rows of one data set.

    file int32 [N] into `paths`; offset, length int64 [N], bytes; height, width int32 [N], upright
    (after EXIF); label int64 [N], or int8 [N, 20] where an image has many: 1 present, 0 absent, -1
    ignored; kind uint8 [N] into images.KINDS; orientation uint8 [N], EXIF's 1..8 of the stored pixels, which
    decoders apply and do not read; coding uint8 [N], as in coding.py, so that no header is read twice (both are 0, UNKNOWN,
    in manifests that were made before they were kept).
    file_state   int64 [F, 2], size in bytes and modification time in ns of each file as indexed; None in manifests that
                 were made before this was kept: then a file's size is known where it is one image.
    content      hash of what the images are: what a resume checks.
    storage      hash of paths, sizes and times: what the cache checks.
    quarantined  [path, reason] of files that are no sound images.
    """

    file: NDArray[np.int32]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    height: NDArray[np.int32]
    width: NDArray[np.int32]
    label: NDArray[np.int64] | NDArray[np.int8]
    kind: NDArray[np.uint8]
    orientation: NDArray[np.uint8]
    coding: NDArray[np.uint8]
    names: NDArray[np.uint8]
    name_ends: NDArray[np.int64]
    source: str
    classes: list[str]
    content: str
    storage: str
    skipped: dict[str, int]
    quarantined: list[list[str]]
    file_state: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.file)

    @property
    def largest(self) -> tuple[int, int]:
        """Greatest height and greatest width; they may be two images'."""
        return int(self.height.max()), int(self.width.max())

    def path(self, row: int) -> bytes:
        """Absolute path of a row's file, as bytes."""
        file = int(self.file[row])
        start = int(self.name_ends[file - 1]) if file else 0
        return self.names[start : int(self.name_ends[file])].tobytes()

    def file_paths(self, files: NDArray[np.integer[Any]]) -> list[bytes]:
        """Absolute paths of these files, by their numbers in `file`."""
        names, spans = memoryview(self.names), self.name_spans(files)
        return [bytes(names[start:end]) for start, end in zip(*(span.tolist() for span in spans), strict=True)]

    def files_used(self) -> NDArray[np.int64]:
        """Numbers of the files that have a row, in order; without a sort, since there may be rows by the hundred million."""
        used = np.zeros(len(self.name_ends), bool)
        for first in range(0, len(self), _AT_ONCE):
            used[self.file[first : first + _AT_ONCE]] = True
        return np.flatnonzero(used)

    def name_spans(self, files: NDArray[np.integer[Any]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where these files' paths begin and end in `names`."""
        return np.where(files > 0, self.name_ends[files - 1], 0), self.name_ends[files]

    def name(self, row: int) -> str:
        """A row's place, for a person: its file, and where in it."""
        return place(self.path(row), int(self.offset[row]))

    def change(self, file: int, size: int, time_ns: int) -> str:
        """How a file of this size and time differs from the one that was indexed; "" = not at all, or not known."""
        if self.file_state is None:
            return ""
        now, was = (size, time_ns), tuple(self.file_state[file].tolist())
        return "" if now == was else difference(now, was)

    def with_files_as_they_are(self) -> "Manifest":
        """The same rows, in files whose size and time are those of now."""
        return replace(self, file_state=states(self.file_paths(np.arange(len(self.name_ends)))))

    def with_times_of_now(self) -> "Manifest":
        """The same rows, in copies of the files: sizes as indexed, times of now."""
        if self.file_state is None:
            return self
        now = states(self.file_paths(np.arange(len(self.name_ends))))
        return replace(self, file_state=np.stack([self.file_state[:, 0], now[:, 1]], axis=1))

    def moved(self, old: str, new: str) -> "Manifest":
        """The same rows of a source that lies at `new` in place of `old`, absolute paths."""
        was, now = list(Path(old).parts), list(Path(new).parts)
        while was and now and was[-1] == now[-1]:
            del was[-1], now[-1]
        if not was or not now:
            return self
        root, other = (os.path.join(os.fsencode(os.path.join(*parts)), b"") for parts in (was, now))
        paths = self.file_paths(np.arange(len(self.name_ends)))
        paths = [other + path[len(root) :] if path.startswith(root) else path for path in paths]
        ends = np.cumsum([len(path) for path in paths], dtype=np.int64)
        return replace(self, names=np.frombuffer(b"".join(paths), np.uint8), name_ends=ends)

    def some(self, rows: NDArray[np.int64]) -> "Manifest":
        """These rows alone; their content follows from this one's and which rows they are."""
        sha = hashlib.sha256(self.content.encode() + rows.astype("<i8").tobytes())
        return replace(self, **{name: getattr(self, name)[rows] for name in COLUMNS}, content=sha.hexdigest())

    def save(self, folder: Path) -> None:
        """Write the manifest; the folder appears whole or not at all."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        meta = {name: getattr(self, name) for name in _META} | {"format": FORMAT}
        with replacing(folder, folder=True) as scratch:
            for name in (*COLUMNS, "names", "name_ends"):
                np.save(scratch / f"{name}.npy", getattr(self, name), allow_pickle=False)
            if self.file_state is not None:
                np.save(scratch / "file_state.npy", self.file_state, allow_pickle=False)
            meta["files"] = {path.name: asdict(Sealed.of(path)) for path in sorted(scratch.iterdir())}
            (scratch / "meta.json").write_text(json.dumps(meta, indent=1))

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Map a saved manifest. Raises UserError where it is missing or damaged."""
        try:
            meta = vars(read_json(folder / "meta.json", _Meta))
            names = [name for name in (*COLUMNS, "names", "name_ends") if name not in _LATE]
            kept: dict[str, Any] = {name: _view(folder / f"{name}.npy") for name in names}
            for late in _LATE:
                path = folder / f"{late}.npy"
                kept[late] = _view(path) if path.exists() else None
            for late in ("orientation", "coding"):
                if kept[late] is None:
                    kept[late] = np.full(len(kept["file"]), UNKNOWN, np.uint8)
            _refuse_misfits(kept)
            return cls(**kept, **meta)
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: not a manifest that can be read ({error}); remove it") from None


def _view(path: Path) -> NDArray[Any]:
    """An array on disk; a plain view of the mapping: numpy's memmap costs microseconds an index."""
    return mapped(path).view(np.ndarray)


def _refuse_misfits(arrays: dict[str, NDArray[Any] | None]) -> None:
    """Raises Damaged where kinds and shapes are not a manifest's; what stands in them is for `fastrot verify`, since there
    may be much of it."""
    rows, files = (arrays[name].shape[:1] for name in ("file", "name_ends"))  # type: ignore[union-attr]
    for name, array in arrays.items():
        if array is not None:
            long = {"file_state": (*files, 2), "name_ends": files, "names": array.shape[:1]}.get(name, rows)
            many = array.shape[1:] if name == "label" else ()
            if array.dtype.kind not in "iu" or not len(long) or array.shape != (*long, *many):
                raise Damaged(f"{name}.npy is {array.dtype} {list(array.shape)} beside {list(rows)} rows")


def _when(time_ns: int) -> str:
    return str(np.datetime64(time_ns, "ns"))


def place(path: bytes, offset: int) -> str:
    """A file's name as text, whatever its bytes, and the offset where the image does not begin it."""
    name = as_words(path)
    return f"{name} at byte {offset}" if offset else name


@dataclass(frozen=True)
class _Meta:
    """meta.json. source: any text, since a path may not be UTF-8."""

    source: Any
    classes: list[Any]
    content: str
    storage: str
    skipped: dict[str, int]
    quarantined: list[list[Any]]


_META = tuple(_Meta.__annotations__)


def changed_files(manifest: Manifest, most: int = 100_000) -> tuple[list[list[str]], int]:
    """[path, what differs] of files that are not as they were indexed, and how many were looked at.

    most  files looked at, spread evenly where there are more. Raises UserError or Fault where the system cannot tell.
    """
    files = manifest.files_used()
    if len(files) > most:
        files = files[np.linspace(0, len(files) - 1, most).astype(np.int64)]
    paths = manifest.file_paths(files)
    now = states(paths)
    if manifest.file_state is not None:
        was = manifest.file_state[files]
    else:  # a file that is one image has its size; a shard's images have an offset
        used, row = np.unique(manifest.file, return_index=True)
        row = row[np.searchsorted(used, files)]
        was = np.where((manifest.offset[row] == 0)[:, None] & (True, False), manifest.length[row][:, None], now)
    odd = np.flatnonzero((now != was).any(axis=1) | (now[:, 0] < 0)).tolist()
    return [[place(paths[at], 0), difference(now[at].tolist(), was[at].tolist())] for at in odd], len(files)


def difference(now: Sequence[int], was: Sequence[int]) -> str:
    """Of a file's (size, time) from what they were, in words."""
    if now[0] < 0:
        return "gone" if now[0] == GONE else "no regular file any more"
    if now[0] != was[0]:
        return f"changed: {now[0]} bytes, {was[0]} when indexed"
    return f"changed: written {_when(now[1])}, {_when(was[1])} when indexed"


def content_hash(
    height: NDArray[Any], width: NDArray[Any], label: NDArray[Any], length: NDArray[Any], head: NDArray[np.uint8]
) -> str:
    """sha256 over the rows' bytes in order: what the images are, wherever they lie.

    A row's bytes: height, width, label, length as <i8, then `head`, the sha256 of the image's first
    4 KiB. With many labels an image, its label is i1 [20] instead.
    """
    sha = hashlib.sha256()
    for first in range(0, len(height), _AT_ONCE):
        some = slice(first, first + _AT_ONCE)
        numbers = (height, width, label, length)
        kinds = ("<i8", "<i8", "<i8" if label.ndim == 1 else "i1", "<i8")
        columns = [np.ascontiguousarray(a[some].astype(k)) for a, k in zip(numbers, kinds, strict=True)]
        columns = [column.view(np.uint8).reshape(len(column), -1) for column in (*columns, head[some])]
        sha.update(np.concatenate(columns, axis=1).tobytes())
    return sha.hexdigest()
