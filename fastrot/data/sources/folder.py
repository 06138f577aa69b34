"""A folder of class folders, as torchvision's ImageFolder has it."""

import os
from collections import Counter

from fastrot.data.sources.listing import Listing, whole_files
from fastrot.errors import UserError

# torchvision's IMG_EXTENSIONS, any case
EXTENSIONS = (b".jpg", b".jpeg", b".png", b".ppm", b".bmp", b".pgm", b".tif", b".tiff", b".webp")


def open_source(root: str) -> Listing:
    """Classes by name, then files by relative path, both as bytes; links followed, hidden skipped.

    Raises UserError where the folder is missing, unreadable, or holds no image in a class folder.
    """
    top = os.fsencode(os.path.abspath(root))
    if not os.path.exists(top):
        raise UserError(f"{root}: no such folder; expected one folder a class with images in it")
    if not os.path.isdir(top):
        raise UserError(f"{root}: is a file; expected a folder of class folders, or list:{root}")
    skipped: Counter = Counter()
    names, direct = [], 0
    for entry in _entries(top, root):
        if entry.name.startswith(b"."):
            skipped["hidden"] += 1
        elif entry.is_dir():
            names.append(entry.name)
        else:
            direct += 1
            skipped["outside a class folder"] += 1
    paths, labels, empty = [], [], []
    for label, name in enumerate(sorted(names)):
        found = sorted(_images(os.path.join(top, name), root, skipped, set()))
        if not found:
            empty.append(os.fsdecode(name))
        paths += found
        labels += [label] * len(found)
    if not paths:
        what = f"holds {direct} files but no class folder" if direct and not names else "holds no image"
        raise UserError(f"{root}: {what}; expected one folder a class with images in it")
    skipped.update({"empty class folder": len(empty)} if empty else {})
    classes = [os.fsdecode(name) for name in sorted(names)]
    return whole_files(paths, labels, classes, skipped)


def _entries(folder: bytes, root: str):
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(f"{root}: cannot list {os.fsdecode(folder)} ({error.strerror})") from None


def _images(folder: bytes, root: str, skipped: Counter, seen: set) -> list[bytes]:
    """Image files below `folder`; each real folder once, so a loop of links ends."""
    stat = os.stat(folder)
    if (stat.st_dev, stat.st_ino) in seen:
        skipped["folder seen before (link)"] += 1
        return []
    seen.add((stat.st_dev, stat.st_ino))
    found = []
    for entry in _entries(folder, root):
        if entry.name.startswith(b"."):
            skipped["hidden"] += 1
        elif entry.is_dir():
            found += _images(entry.path, root, skipped, seen)
        elif not entry.is_file():
            skipped["broken link" if entry.is_symlink() else "not a file"] += 1
        elif entry.name.lower().endswith(EXTENSIONS):
            found.append(entry.path)
        else:
            skipped["other extension"] += 1
    return found
