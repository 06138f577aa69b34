"""Sources: a word in the config -> the files of a data set, in row order."""

import os

from fastrot.data.sources import beton, filelist, folder, tar
from fastrot.data.sources.listing import Listing

_SHARDS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_BY_PREFIX = {"list": filelist.open_source}


def open_source(spec: str) -> Listing:
    """List the images of `spec`: a folder of class folders, list:FILE, tar shards (a name, range or glob), or NAME.beton.

    Raises UserError where there is nothing to read.
    """
    prefix, colon, rest = spec.partition(":")
    if colon and prefix in _BY_PREFIX:
        return _BY_PREFIX[prefix](rest)
    if spec.endswith(_SHARDS) and not os.path.isdir(spec):
        return tar.open_source(spec)
    if spec.endswith(".beton") and not os.path.isdir(spec):
        return beton.open_source(spec)
    return folder.open_source(spec)
