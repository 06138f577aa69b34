"""Sources: a word in the config -> the files of a data set, in row order."""

import os

from fastrot.data.reading import exists
from fastrot.data.scan import Track
from fastrot.data.sources import beton, coco, filelist, folder, joined, segmentation, tar, voc
from fastrot.data.sources.listing import Listing
from fastrot.errors import UserError
from fastrot.remote import absolute, is_remote, shown

_SHARDS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_BY_PREFIX = {
    "list": filelist.open_source,
    "voc": voc.open_source,
    "coco": coco.open_source,
    "images": folder.open_images,
}
MASKED = ("vocseg", "cityscapes", "pairs")  # prefixes of sources whose images have masks
_JOINED = (*_BY_PREFIX, *MASKED)


def open_source(spec: str, track: Track) -> Listing:
    """List the images of `spec`: a folder of class folders, images:FOLDER, list:FILE, voc:ROOT?split=S,
    coco:FILE.json?images=DIR, a source of masks (segmentation.py), several of these joined by +, tar shards (a name, range or glob), or NAME.beton.

    track  track(iterable, total, title) -> iterable: shows progress.
    Raises UserError where there is nothing to read.
    """
    parts = parts_of(spec)
    if len(parts) > 1:
        return joined.open_source(parts, lambda part: open_source(part, track))
    prefix, colon, rest = spec.partition(":")
    if colon and prefix in MASKED:
        return segmentation.open_source(spec)
    if colon and prefix in _BY_PREFIX:
        return _BY_PREFIX[prefix](rest)
    if _is_shards(spec):
        return tar.open_source(spec, track)
    if _is_beton(spec):
        return beton.open_source(spec)
    return folder.open_source(spec)


def parts_of(spec: str) -> list[str]:
    """The sources that `spec` joins."""
    return joined.parts_of(spec, _JOINED)


def shards_of(spec: str) -> list[bytes] | None:
    """The few files whose state is that of the whole source; None where every image is a file.

    Raises UserError where one is missing.
    """
    if _is_beton(spec):
        if not is_remote(spec) and not exists(spec):
            raise UserError(f"{spec}: cannot be read (No such file or directory)")
        return [os.fsencode(absolute(spec))]
    return tar.shards_of(spec) if _is_shards(spec) else None


def in_place(spec: str) -> bool:
    """Whether a source at an address is read there, by ranges: a manifest that keeps it must hold no secret."""
    return is_remote(spec) and shown(spec) == spec and (_is_shards(spec) or _is_beton(spec))


def rules_of(spec: str) -> str:
    """Which rules list `spec`, where its files' state does not tell: with other rules a cached listing is no more."""
    return " labels of whole keys" if _is_shards(spec) else ""


def _is_shards(spec: str) -> bool:
    return spec.endswith(_SHARDS) and not os.path.isdir(spec)


def _is_beton(spec: str) -> bool:
    return spec.endswith(".beton") and not os.path.isdir(spec)
