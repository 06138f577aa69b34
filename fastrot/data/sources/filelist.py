"""list:FILE -- one `path<TAB>label` a line, paths relative to the list; labels are integers, or names of classes."""

import codecs
import os

import numpy as np
from numpy.typing import NDArray

from fastrot.data.reading import GONE, IRREGULAR, read_text_file, refusal, states
from fastrot.data.sources.listing import Listing, whole_files
from fastrot.errors import UserError

_EXPECTED = "expected `path<TAB>label` lines"


def open_source(name: str) -> Listing:
    """Files in the order written; a line without a label gets -1. Integers stay as they are; names become classes, in
    the order of their bytes.

    Raises UserError where the list or a file in it is missing or no regular file, or labels are of both sorts.
    """
    lines = _lines(name)
    base = os.fsencode(os.path.dirname(os.path.abspath(name)))
    numbers, paths, words = [], [], []
    for number, line in enumerate(lines, 1):
        if line.strip():
            path, _, word = line.partition(b"\t")
            numbers.append(number)
            paths.append(os.path.join(base, path))
            words.append(word.strip())
    if not paths:
        raise UserError(f"list:{name}: is empty; {_EXPECTED}")
    labels, classes = _labels(name, numbers, words)
    _refuse_missing(name, numbers, paths)
    return whole_files(paths, labels, classes)


def _lines(name: str) -> list[bytes]:
    try:
        text = read_text_file(name)
    except OSError as error:
        raise refusal(f"list:{name}: cannot be read; {_EXPECTED}", error) from None
    if text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"list:{name}: is UTF-16 text; save it as UTF-8")
    lines = text.removeprefix(codecs.BOM_UTF8).splitlines()  # a mark that Windows' editors leave
    for number, line in enumerate(lines, 1):
        if b"\0" in line:
            raise UserError(f"list:{name}: line {number}: holds a zero byte, so this is no text; {_EXPECTED}")
    return lines


def _labels(name: str, numbers: list[int], words: list[bytes]) -> tuple[NDArray[np.int64], list[str]]:
    """int64 [n], -1 where a line says none; and the classes' names, [] where labels are integers."""
    integers, names = {}, {}  # by what is written; the first line that says so
    for number, word in zip(numbers, words, strict=True):
        if word in integers or word in names or not word:
            continue
        try:
            integers[word] = int(word), number
        except ValueError:
            names[word] = number
            continue
        if not -(1 << 63) <= integers[word][0] < 1 << 63:
            raise UserError(f"list:{name}: line {number}: label {os.fsdecode(word)} is more than 64 bits hold")
    if integers and names:
        (number, one), (line, other) = (
            next((at, w) for w, at in names.items()),
            next((v[1], w) for w, v in integers.items()),
        )
        raise UserError(
            f"list:{name}: label {os.fsdecode(one)!r} in line {number} is a name, {os.fsdecode(other)!r} in line {line} "
            "is an integer; write all labels in one way"
        )
    value = {word: at for at, word in enumerate(sorted(names))} | {word: label for word, (label, _) in integers.items()}
    return np.array([value.get(word, -1) for word in words], np.int64), [os.fsdecode(word) for word in sorted(names)]


def _refuse_missing(name: str, numbers: list[int], paths: list[bytes]) -> None:
    size = states(paths)[:, 0]
    for code, what in (
        (GONE, "no such file {}"),
        (IRREGULAR, "{} is a folder, a pipe or a device; regular files alone are read"),
    ):
        odd = np.flatnonzero(size == code)
        if len(odd):
            said = "missing" if code == GONE else "such"
            line = what.format(os.fsdecode(paths[odd[0]]))
            raise UserError(f"list:{name}: line {numbers[odd[0]]}: {line} ({len(odd)} {said} in all)")
