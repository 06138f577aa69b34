"""A run kept at a distance too: its checkpoints copied beside the training, verified, and taken where a run has none."""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastrot.data.pieces import PIECE
from fastrot.errors import Fault, UserError
from fastrot.files import Damaged, read_json, replacing
from fastrot.remote import Entry, Store, open_store
from fastrot.runs import checkpoint

_ROOT = "checkpoints"
_WHOLE = "manifest.json"  # of a checkpoint: written last
_NOTES = (f"{_ROOT}/best", f"{_ROOT}/latest")
_LOG = ("metrics.jsonl", "bad_images.jsonl", "stream.json", "loggers.json")
_FACTS = ("config.yaml", "environment.json", "STATUS.json", "backbone.safetensors")


class Mirror:
    """Copies of a run's checkpoints below an address. Nothing here ends a training: what fails is said, once until it
    works again, and the next checkpoint is tried."""

    def __init__(self, address: str, run: Path, say: Callable[[str], None]):
        self._store, self._run, self._say = open_store(address), run, say
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="mirror")
        self._newest: Path | None = None
        self._failed = False

    def send(self, folder: Path) -> None:
        """Begin to copy a finished checkpoint; one that still waits for its turn gives it to this one."""
        self._newest = folder
        self._pool.submit(self._try, lambda: self._copy(folder), folder.name)

    def close(self, begun: bool) -> None:
        """Copy how the run ended, where it began, and wait until all is there."""
        if begun:
            self._pool.submit(self._try, lambda: self._put_all((*_NOTES, *_LOG, *_FACTS)), "how the run ended")
        self._pool.shutdown()

    def _try(self, work: Callable[[], None], what: str) -> None:
        try:
            work()
            self._failed = False
        except (UserError, Fault, OSError) as error:
            if not self._failed:
                self._say(
                    f"run.mirror: {what} was not copied ({error}); training goes on, the next checkpoint tries again"
                )
            self._failed = True

    def _copy(self, folder: Path) -> None:
        if folder != self._newest:
            return
        try:
            files = {file.name: file.read_bytes() for file in sorted(folder.iterdir(), key=lambda f: f.name == _WHOLE)}
        except FileNotFoundError:
            return  # the run has let it go: a newer one is to come
        for name, data in files.items():
            put(self._store, data, f"{_ROOT}/{folder.name}/{name}")
        self._put_all((*_NOTES, *_LOG, *_FACTS[:2]))
        self._thin_out(folder.name)

    def _put_all(self, names: tuple[str, ...]) -> None:
        for name in names:
            if (self._run / name).exists():
                put(self._store, (self._run / name).read_bytes(), name)

    def _thin_out(self, newest: str) -> None:
        """Remove older checkpoints that the run itself has let go."""
        for name, files in _checkpoints(self._store).items():
            if name < newest and not (self._run / _ROOT / name).exists():
                for entry in sorted(files, key=lambda entry: not entry.name.endswith(_WHOLE)):
                    self._store.remove(entry.name)


def put(store: Store, data: bytes, name: str) -> None:
    """Write a file and see that it is there: by the store's checksum, or else read again. Raises UserError, Fault."""
    store.put(data, name)
    there = store.info(name)
    if there.size == len(data) and there.checksum and store.vouches(there):
        kind, want = there.checksum
        same = hashlib.new(kind, data).hexdigest() == want
    else:
        starts = range(0, len(data), PIECE)
        same = there.size == len(data) and all(
            store.read(there, at, at + PIECE).data == data[at : at + PIECE] for at in starts
        )
    if not same:
        raise Fault(f"{store.at(name)}: is not what was written")


def take(address: str, run: Path, say: Callable[[str], None]) -> None:
    """Bring the newest sound checkpoint of a mirror, and what else is kept of its run, where it is newer than the run's own.

    say  called with a line for what was brought and for each checkpoint passed over. Raises UserError, Fault.
    """
    store, own = open_store(address), checkpoint.newest(run)
    kept = _checkpoints(store)
    for name in sorted(kept, key=checkpoint.step_of, reverse=True):
        if own is not None and checkpoint.step_of(name) <= checkpoint.step_of(own.name):
            return
        if wrong := _bring(store, kept[name], run / _ROOT / name):
            say(f"run.mirror: {name} is damaged ({wrong}); taking the one before")
            continue
        for note in (*_NOTES, *_LOG):
            with suppress(UserError):  # not kept there
                text = store.whole(note)
                with replacing(run / note) as scratch:
                    scratch.write_bytes(text)
        best = _best(run)
        if best in kept and best != name:
            _bring(store, kept[best], run / _ROOT / best)
        return say(f"run.mirror: {name} brought from {store.root}")


def _best(run: Path) -> str:
    """The name that the run's note of its best says; "" = none."""
    try:
        return str(read_json(run / _NOTES[0], dict[str, Any]).get("name", ""))
    except (OSError, ValueError):
        return ""


def holds(address: str) -> str:
    """The newest checkpoint's name in a mirror; "" = none. Raises UserError, Fault."""
    return max(_checkpoints(open_store(address)), key=checkpoint.step_of, default="")


def _checkpoints(store: Store) -> dict[str, list[Entry]]:
    """The files of each checkpoint that was written to its end, by its name."""
    found: dict[str, list[Entry]] = {}
    for entry in store.find():
        root, _, rest = entry.name.partition("/")
        name, _, file = rest.partition("/")
        if root == _ROOT and checkpoint.step_of(name) >= 0 and file:
            found.setdefault(name, []).append(entry)
    return {name: files for name, files in found.items() if any(e.name.endswith(f"/{_WHOLE}") for e in files)}


def _bring(store: Store, files: list[Entry], folder: Path) -> str:
    """Fetch a checkpoint; it appears where it is sound. Returns what is wrong with it, or nothing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(folder, folder=True) as scratch:
            for entry in files:
                with (scratch / entry.name.rpartition("/")[2]).open("wb") as file:
                    for start in range(0, entry.size or 0, PIECE):
                        file.write(store.read(entry, start, start + PIECE).data or b"")
            if wrong := checkpoint.verify(scratch):
                raise Damaged(wrong)
    except Damaged as error:
        return str(error)
    return ""
