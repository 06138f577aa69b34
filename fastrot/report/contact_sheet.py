"""The contact sheet of `fastrot predict`: some dozens of images with what was found, one HTML file."""

from pathlib import Path

import numpy as np

from fastrot.files import as_words, write_text
from fastrot.report.drawn import drawn, legend
from fastrot.runs.predict import Mask, Shown
from fastrot.tasks.detect import Found
from fastrot.templates import template

_SHOWN = 48


class ContactSheet:
    """A Sheet of at most 48 images, evenly spread. names: of all images; classes: of the labels."""

    def __init__(self, names: list[str], classes: list[str]):
        self._names, self._classes = names, classes
        self._rows = set(np.linspace(0, len(names) - 1, min(len(names), _SHOWN)).round().astype(int).tolist())
        self._pictures: list[tuple[str, str]] = []
        self._there: set[int] = set()

    def add(self, row: int, shown: Shown, found: Found | Mask) -> None:
        """Draw one prediction, where it is of the sheet."""
        if row in self._rows:
            name = as_words(self._names[row])
            self._pictures.append((name, drawn(shown, found, self._classes)))
            self._there |= set(np.unique(found).tolist()) if isinstance(found, np.ndarray) else set()

    def save(self, folder: Path) -> None:
        """Write index.html into `folder`."""
        colours = legend(self._there, self._classes)
        html = template("fastrot.report", "contact_sheet.html").render(
            pictures=self._pictures, of=len(self._names), colours=colours
        )
        write_text(folder / "index.html", html)
