"""bad_images.jsonl: every image replaced while running."""

import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from fastrot.errors import Fault
from fastrot.files import Damaged, as_json


@dataclass(frozen=True)
class _Entry:
    path: str
    source: str


class BadImages:
    """bad_images.jsonl: every image replaced while running, once over all ranks and resumes.

    path    the file, shared by the ranks; None keeps the list in memory.
    source  the data set; most counts its images alone, and a longer list stops the run.
    """

    def __init__(self, path: Path | None, source: str, most: int):
        self._path, self._source, self._most = path, source, most
        self._known: set[str] = set()
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """Images of this source listed so far, over all ranks and resumes."""
        with self._lock:
            self._read_what_other_ranks_found()
            return len(self._known)

    def add(self, name: str, row: int, reason: str) -> None:
        """List one image by its place. Raises Fault when there are more than data.max_bad."""
        with self._lock:
            if name in self._known:
                return
            self._read_what_other_ranks_found()
            if name not in self._known:
                self._known.add(name)
                if self._path is not None:
                    self._append({"path": name, "source": self._source, "row": row, "reason": reason})
        if len(self._known) > self._most:
            raise Fault(
                f"{len(self._known)} unreadable images, more than data.max_bad {self._most}; the last: "
                f"{name}: {reason}" + (f"; all are in {self._path}" if self._path else "")
            )

    def _append(self, entry: dict[str, str | int]) -> None:
        assert self._path is not None
        with self._path.open("ab+") as file:
            torn = file.tell() > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"  # a kill's half line
            file.write(b"\n" * torn + json.dumps(entry).encode() + b"\n")

    def _read_what_other_ranks_found(self) -> None:
        if self._path is not None and self._path.exists():
            lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            self._known |= {path for path, source in map(_entry, lines) if source == self._source}


def _entry(line: str) -> tuple[str, str | None]:
    """(path, source) of a line; of one that a kill left half written, nobody's."""
    try:
        entry = as_json(line.encode(), _Entry)
    except Damaged:
        return "", None
    return entry.path, entry.source
