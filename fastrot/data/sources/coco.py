"""coco:FILE.json?images=DIR -- the images that a COCO-format file lists, in its order; no labels of whole images."""

import os
from pathlib import Path

from fastrot.data.coco_json import read_coco
from fastrot.data.sources.listing import Listing, whole_files
from fastrot.errors import UserError


def open_source(rest: str) -> Listing:
    """Images in the file's order; labels -1.  rest  FILE?images=DIR.

    Raises UserError where the file is none of COCO's format, or an image is not there.
    """
    file, images = split(rest)
    content = read_coco(file)
    folder = os.fsencode(images.absolute())
    files = [os.path.join(folder, os.fsencode(image.file_name)) for image in content.images]
    missing = [path for path in files if not os.path.isfile(path)]
    if missing:
        first = os.fsdecode(missing[0])
        raise UserError(f"coco:{rest}: no such file {first}, which {file.name} lists ({len(missing)} missing in all)")
    return whole_files(files, [-1] * len(files), [])


def split(rest: str) -> tuple[Path, Path]:
    """The annotations and the folder of images. Raises UserError."""
    file, option, images = rest.partition("?images=")
    if not option:
        raise UserError(f"coco:{rest}: expected coco:FILE.json?images=FOLDER")
    if not Path(images).is_dir():
        raise UserError(f"coco:{rest}: no such folder {images}")
    return Path(file), Path(images)
