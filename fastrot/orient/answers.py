"""What a rotation network says of an image, and its line of JSON: numpy alone.

A turn is a number of quarter turns counter-clockwise that an image has been turned by; as many clockwise put it upright.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fastrot.errors import UserError
from fastrot.files import Damaged, as_json

TURNS = 4
Tag = Literal["right", "wrong", "missing", "none"]
TAGS: tuple[Tag, ...] = get_args(Tag)
# of turn t seen in an image that is shown turned by s more: [s, t]
_SEEN = (np.arange(TURNS)[:, None] + np.arange(TURNS)) % TURNS


def combined(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Logits [n, 4 shown, 4] -> log-probabilities float64 [n, 4] of the turns of images as they are.

    Row s holds the logits of the image shown turned by s quarter turns counter-clockwise: its class is that much further.
    The answer turns with the image, bit for bit: images whose rows are rolled by k get what is rolled by k.
    """
    evidence = logits.astype(np.float64)[:, np.arange(TURNS)[:, None], _SEEN]
    return normalised(_sum(evidence, 1) / TURNS)


def normalised(scores: NDArray[np.float64], temperature: float = 1.0) -> NDArray[np.float64]:
    """Log-probabilities [n, 4] of scores over a temperature; they turn with the scores, bit for bit."""
    scaled = (scores - scores.max(1, keepdims=True)) / temperature
    found: NDArray[np.float64] = scaled - np.log(_sum(np.exp(scaled), 1))[:, None]
    return found


def _sum(values: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """A sum that does not depend on the order of its terms, as floating-point sums do."""
    total: NDArray[np.float64] = np.sort(values, axis).sum(axis)
    return total


@dataclass(frozen=True)
class Answer:
    """What is known of one image.

    file           absolute path, or of an image inside a file that file and where in it; row: of the source's manifest.
    group          the class folder or class name that the source has for it.
    clockwise      degrees that put the image upright, as shown: after its EXIF tag; of an undecided one, the best guess.
    probabilities  that it has been turned by 0, 90, 180, 270 degrees counter-clockwise.
    decided        whether the network is sure enough to turn it, or to leave it.
    exif           orientation 1..8 by which it is shown, 1 also where it has no tag; None: not looked for.
    """

    file: str
    row: int
    group: str | None
    clockwise: int
    probabilities: tuple[float, float, float, float]
    decided: bool
    exif: int | None

    @property
    def confidence(self) -> float:
        return max(self.probabilities)

    @property
    def tag(self) -> Tag:
        """What the decided answer says of the EXIF tag: right, wrong, missing where one is needed, or none to speak of."""
        if not self.decided:
            return "none"
        if (self.exif or 1) > 1:
            return "wrong" if self.clockwise else "right"
        return "missing" if self.clockwise else "none"

    def line(self) -> str:
        """JSON without a line's end."""
        return _line(vars(self) | {"tag": self.tag})


@dataclass(frozen=True)
class Unread:
    """An image that cannot be read, and why; file, group: as of an Answer."""

    file: str
    group: str | None
    unreadable: str

    def line(self) -> str:
        return _line(vars(self))


def _line(values: dict[str, Any]) -> str:
    return json.dumps({"class" if name == "group" else name: value for name, value in values.items()})


def answer(
    file: str, row: int, group: str | None, exif: int | None, log_probabilities: NDArray[np.float64], least: float
) -> Answer:
    """The answer of log-probabilities [4]; decided where one turn alone is the likeliest and is at least `least` likely."""
    p = np.exp(log_probabilities)
    best = int(p.argmax())
    decided = bool(p[best] >= least and np.count_nonzero(p == p[best]) == 1)
    return Answer(file, row, group, 90 * best, tuple(p.tolist()), decided, exif)


def lines_path(out: str | None) -> Path | None:
    """Where lines of JSON go, a contact sheet beside them; None: nowhere. Raises UserError where the name is another's."""
    if out is not None and Path(out).suffix != ".jsonl":
        raise UserError(f"--out {out}: expected a name ending in .jsonl; the contact sheet goes beside it, as .html")
    return None if out is None else Path(out)


def read(path: Path) -> Iterator[Answer]:
    """The answers of a file, in order; what could not be read is passed over. Raises UserError."""
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                yield from _answers_in(line, f"{path}: line {number}")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name what fastrot orient --out wrote") from None


def _answers_in(line: bytes, where: str) -> Iterator[Answer]:
    """The one of a line, or none."""
    try:
        values = as_json(line, dict[str, Any])
        if "unreadable" not in values:
            named = {"group" if name == "class" else name: value for name, value in values.items()} | {"file": ""}
            found = as_json(json.dumps(named).encode(), Answer)
            yield replace(found, file=values["file"])  # any text: a path's bytes need not be UTF-8
    except (Damaged, KeyError) as error:
        raise UserError(f"{where} is no answer of fastrot orient ({error})") from None
