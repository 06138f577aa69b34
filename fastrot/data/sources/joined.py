"""A+B: sources of whole files one after the other, as voc:VOC2007?split=trainval+voc:VOC2012?split=trainval."""

import re
from collections import Counter
from collections.abc import Callable, Collection

import numpy as np

from fastrot.data.sources.listing import Listing
from fastrot.errors import UserError


def parts_of(spec: str, prefixes: Collection[str]) -> list[str]:
    """The sources that `spec` joins, each with its prefix; one where it joins none."""
    words = "|".join(map(re.escape, sorted(prefixes)))
    return re.split(rf"\+(?=(?:{words}):)", spec) if re.match(rf"(?:{words}):", spec) else [spec]


def open_source(parts: list[str], open_one: Callable[[str], Listing]) -> Listing:
    """The rows of all parts, in order. Raises UserError where their labels do not mean the same, or an image stands in
    two of them."""
    listings = [open_one(part) for part in parts]
    first = listings[0]
    skipped: Counter[str] = Counter()
    files: list[bytes] = []
    file = []
    for part, one in zip(parts, listings, strict=True):
        if one.classes != first.classes or one.labels.shape[1:] != first.labels.shape[1:]:
            raise UserError(f"{part}: its labels are not those of {parts[0]}; join sets of one kind")
        file.append(one.file + len(files))
        files += one.files
        skipped += one.skipped
    if len(set(files)) < len(files):
        (twice, _), *_ = Counter(files).most_common(1)
        raise UserError(f"{'+'.join(parts)}: {twice.decode(errors='replace')} is in two of them")
    offset, length, labels = (np.concatenate([getattr(o, n) for o in listings]) for n in ("offset", "length", "labels"))
    return Listing(files, np.concatenate(file), offset, length, labels, first.classes, skipped)
