"""A folder of class folders, as torchvision's ImageFolder has it; or of images alone, which have no labels.

images:FOLDER is every image below a folder, without labels.
"""

import errno
import os
from collections import Counter

from fastrot.data.reading import again, exists, refusal
from fastrot.data.sources.listing import Listing, whole_files
from fastrot.errors import UserError

# torchvision's IMG_EXTENSIONS, any case
EXTENSIONS = (b".jpg", b".jpeg", b".png", b".ppm", b".bmp", b".pgm", b".tif", b".tiff", b".webp")
_FOLDER, _FILE = "folder", "file"


def open_source(root: str) -> Listing:
    """Classes by name, then files by relative path, both as bytes; links followed, hidden skipped. Where no folder in it
    holds an image: its own images by name, labels -1.

    Raises UserError where the folder is missing, unreadable, or holds no image.
    """
    top = _top(root)
    skipped: Counter[str] = Counter()
    names: list[bytes] = []
    direct: list[os.DirEntry[bytes]] = []
    for entry in _entries(top, root):
        if entry.name.startswith(b"."):
            skipped["hidden"] += 1
        elif _kind(entry, root) == _FOLDER:
            names.append(entry.name)
        else:
            direct.append(entry)
    names.sort()
    of_class = [sorted(_images(os.path.join(top, name), root, skipped, set())) for name in names]
    empty = sum(not found for found in of_class)
    if empty:
        skipped["empty class folder"] = empty
    if empty < len(names):
        if direct:
            skipped["outside a class folder"] = len(direct)
        paths = [path for found in of_class for path in found]
        labels = [label for label, found in enumerate(of_class) for _ in found]
        return whole_files(paths, labels, [os.fsdecode(name) for name in names], skipped)
    paths = sorted(entry.path for entry in direct if _is_image(entry, root, skipped))
    if not paths:
        raise UserError(f"{root}: holds no image; expected images, or one folder a class with images in it")
    return whole_files(paths, [-1] * len(paths), [], skipped)


def open_images(root: str) -> Listing:
    """Every image below a folder, by path as bytes; labels -1; links followed, hidden skipped.

    Raises UserError as open_source.
    """
    skipped: Counter[str] = Counter()
    paths = sorted(_images(_top(root), root, skipped, set()))
    if not paths:
        raise UserError(f"{root}: holds no image, nor does a folder below it")
    return whole_files(paths, [-1] * len(paths), [], skipped)


def _top(root: str) -> bytes:
    """A folder's absolute path. Raises UserError where it is none."""
    top = os.fsencode(os.path.abspath(root))
    if not exists(top):
        raise UserError(f"{root}: no such folder; expected images, or one folder a class with images in it")
    if not os.path.isdir(top):
        raise UserError(f"{root}: is a file; expected a folder of class folders, or list:{root}")
    return top


def _entries(folder: bytes, root: str) -> list[os.DirEntry[bytes]]:
    def listed() -> list[os.DirEntry[bytes]]:
        with os.scandir(folder) as entries:
            return list(entries)

    try:
        return again(listed)
    except OSError as error:
        raise refusal(f"{root}: cannot list {os.fsdecode(folder)}", error) from None


def _kind(entry: os.DirEntry[bytes], root: str) -> str:
    """_FOLDER, _FILE, or why it is passed over. Raises UserError or Fault where the system cannot tell."""
    try:
        if again(entry.is_dir):
            return _FOLDER
        if again(entry.is_file):
            return _FILE
        return "broken link" if entry.is_symlink() and not os.path.exists(entry.path) else "not a file"
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself
            return "broken link"
        raise refusal(f"{root}: cannot read {os.fsdecode(entry.path)}", error) from None


def _is_image(entry: os.DirEntry[bytes], root: str, skipped: Counter[str]) -> bool:
    """Whether it is a file named as an image; counted where it is not."""
    kind = _kind(entry, root)
    if kind != _FILE:
        skipped[kind] += 1
    elif not entry.name.lower().endswith(EXTENSIONS):
        skipped["other extension"] += 1
    else:
        return True
    return False


def _images(folder: bytes, root: str, skipped: Counter[str], seen: set[tuple[int, int]]) -> list[bytes]:
    """Image files below `folder`; each real folder once, so a loop of links ends."""
    try:
        stat = again(os.stat, folder)
    except OSError as error:
        raise refusal(f"{root}: cannot list {os.fsdecode(folder)}", error) from None
    if (stat.st_dev, stat.st_ino) in seen:
        skipped["folder seen before (link)"] += 1
        return []
    seen.add((stat.st_dev, stat.st_ino))
    found = []
    for entry in _entries(folder, root):
        if entry.name.startswith(b"."):
            skipped["hidden"] += 1
        elif _kind(entry, root) == _FOLDER:
            found += _images(entry.path, root, skipped, seen)
        elif _is_image(entry, root, skipped):
            found.append(entry.path)
    return found
