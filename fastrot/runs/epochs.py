"""The digest of each epoch's stream, recorded beside the training and off the step's path.

stream.json in a run's folder lists in `epochs` each that is over: its number, its digest, and the settings of the plan that
it follows from; `sha256` is of the list, so that damage to it is seen. An epoch's digest is StreamHash's were a step 65,536 images that begin with the epoch's first: it
depends on no batch and no rank.
"""

import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrot.data.plan import Plan, StreamHash
from fastrot.files import Damaged, read_json, write_text

_STEP = 1 << 16


@dataclass(frozen=True)
class Epoch:
    """An entry of stream.json."""

    epoch: int
    sha256: str
    plan: dict[str, Any]


@dataclass(frozen=True)
class _Record:
    epochs: list[Epoch]
    sha256: str


def digest(
    plan: Plan, labels: NDArray[np.integer[Any]], epoch: int, cut: Callable[[], bool] = lambda: False
) -> str | None:
    """Of the whole of an epoch; None where `cut` says so on the way. labels: by row."""
    n, sha = len(plan.heights), StreamHash()
    for first in range(0, n, _STEP):
        if cut():
            return None
        sample = plan.at(epoch * n + first, epoch * n + min(first + _STEP, n))
        sha.add(sample, labels[sample.rows])
    return sha.hexdigest()


def settings(plan: Plan) -> dict[str, Any]:
    """What a plan follows from but for its images, as JSON gives it back."""
    own = {name: value for name, value in vars(plan).items() if name not in ("heights", "widths", "order")}
    settings: dict[str, Any] = json.loads(json.dumps(own | {"order": [type(plan.order).__name__, vars(plan.order)]}))
    return settings


def read(run: Path) -> list[Epoch]:
    """The recorded epochs; none where there is no record. Raises OSError, Damaged."""
    path = run / "stream.json"
    if not path.exists():
        return []
    record = read_json(path, _Record)
    if record.sha256 != _seal(record.epochs):
        raise Damaged("the list of epochs does not match its sha256")
    return record.epochs


def _seal(epochs: list[Epoch]) -> str:
    return hashlib.sha256(json.dumps([asdict(one) for one in epochs]).encode()).hexdigest()


class Recorder:
    """Writes an epoch's digest once it is over, in a thread that lives while there is one to write.

    run  the folder; None where another rank writes.  position: of the stream, where this start begins.
    """

    def __init__(
        self, run: Path | None, plan: Plan, labels: NDArray[np.integer[Any]], position: int, say: Callable[[str], None]
    ):
        self._run, self._plan, self._labels, self._say = run, plan, labels, say
        self._known = self._read() if run else []
        self._settings = settings(plan)
        same = [one.epoch + 1 for one in self._known if one.plan == self._settings]
        self._next = self._until = max(same, default=position // len(plan.heights))
        self._cut, self._thread = False, threading.Thread()

    def passed(self, position: int) -> None:
        """The stream was trained on up to here; returns at once."""
        self._until = max(self._until, position // len(self._plan.heights))
        if self._run and self._next < self._until and not self._thread.is_alive():
            self._thread = threading.Thread(
                target=self._write, args=(self._run, self._until), name="epochs", daemon=True
            )
            self._thread.start()

    def finish(self, whole: bool) -> None:
        """Wait until all that has passed is written; or, not `whole`, leave the rest to the next start."""
        self._cut = not whole
        if self._thread.ident:
            self._thread.join()
        if whole and self._run and self._next < self._until:
            self._write(self._run, self._until)

    def _read(self) -> list[Epoch]:
        assert self._run
        try:
            return read(self._run)
        except (OSError, ValueError) as error:
            self._say(f"{self._run / 'stream.json'} is damaged ({error}) and begun anew")
            return []

    def _write(self, run: Path, until: int) -> None:
        while self._next < until and (sha256 := digest(self._plan, self._labels, self._next, lambda: self._cut)):
            self._known.append(Epoch(self._next, sha256, self._settings))
            self._next += 1
            try:
                record = _Record(self._known, _seal(self._known))
                write_text(run / "stream.json", json.dumps(asdict(record), indent=1) + "\n")
            except OSError as error:
                self._say(f"{run / 'stream.json'}: cannot be written ({error.strerror}); training goes on")
