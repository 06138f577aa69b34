"""list:FILE -- one `path<TAB>label` a line, paths relative to the list."""

import os

from fastrot.data.sources.listing import Listing, whole_files
from fastrot.errors import UserError


def open_source(name: str) -> Listing:
    """Files in the order written; a line without a label gets -1.

    Raises UserError where the list or a file in it is missing, or a label is not an integer.
    """
    try:
        with open(name, "rb") as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise UserError(f"list:{name}: {error.strerror}; expected `path<TAB>label` lines") from None
    base = os.fsencode(os.path.dirname(os.path.abspath(name)))
    paths, labels, missing = [], [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        path, _, label = line.partition(b"\t")
        path = os.path.join(base, path)
        if not os.path.exists(path):
            missing.append((number, path))
        try:
            labels.append(int(label) if label.strip() else -1)
        except ValueError:
            raise UserError(f"list:{name}: line {number}: label {os.fsdecode(label)!r} is not an integer") from None
        paths.append(path)
    if missing:
        number, path = missing[0]
        raise UserError(f"list:{name}: line {number}: no such file {os.fsdecode(path)} ({len(missing)} missing in all)")
    if not paths:
        raise UserError(f"list:{name}: is empty; expected `path<TAB>label` lines")
    return whole_files(paths, labels, [])
