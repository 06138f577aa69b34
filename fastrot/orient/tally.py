"""How many images are upright, turned and undecided; in all and by class folder."""

from collections import Counter
from typing import Any

from fastrot.files import as_words
from fastrot.orient.answers import TAGS, Answer, Unread

_TURNED = ("90", "180", "270")
KINDS = ("upright", *_TURNED, "undecided", "unreadable")
HEADER = ("", "images", "upright", "turn 90", "turn 180", "turn 270", "undecided", "unreadable")
_ROWS = 40  # of class folders, the largest first


class Tally:
    """Adds up answers."""

    def __init__(self) -> None:
        self.tags: dict[str, int] = dict.fromkeys(TAGS, 0)  # of decided images
        self._of: dict[str | None, Counter[str]] = {}
        self._all: Counter[str] = Counter()

    def add(self, one: Answer | Unread) -> None:
        kind = kind_of(one)
        self._all[kind] += 1
        self._of.setdefault(one.group, Counter())[kind] += 1
        if isinstance(one, Answer) and one.decided:
            self.tags[one.tag] += 1

    def __getitem__(self, kind: str) -> int:
        return self._all[kind]

    @property
    def images(self) -> int:
        return self._all.total()

    @property
    def turned(self) -> int:
        return sum(self._all[kind] for kind in _TURNED)

    def rows(self) -> list[list[str]]:
        """Of HEADER: class folders where there are several, the largest first, then all images."""
        largest = sorted(self._of.items(), key=lambda item: -item[1].total())
        shown = largest[:_ROWS] if len(largest) > 1 else []
        rows = [_row("(no class)" if name is None else as_words(name), counts) for name, counts in shown]
        if len(largest) > _ROWS:
            rows.append([f"and {len(largest) - _ROWS:,} more", *[""] * (len(HEADER) - 1)])
        return [*rows, _row("all", self._all)]

    def plain(self) -> dict[str, Any]:
        """For JSON; turned: by degrees clockwise."""
        by_class = {name: _plain(counts) for name, counts in self._of.items() if name is not None}
        return _plain(self._all) | {"tags": self.tags, "by_class": by_class}


def kind_of(one: Answer | Unread) -> str:
    """One of KINDS."""
    if isinstance(one, Unread):
        return "unreadable"
    if not one.decided:
        return "undecided"
    return str(one.clockwise) if one.clockwise else "upright"


def _row(name: str, counts: Counter[str]) -> list[str]:
    return [name, f"{counts.total():,}", *(f"{counts[kind]:,}" for kind in KINDS)]


def _plain(counts: Counter[str]) -> dict[str, Any]:
    turned = {kind: counts[kind] for kind in _TURNED}
    others = {kind: counts[kind] for kind in KINDS if kind not in turned}
    return {"images": counts.total(), "turned": turned} | others
