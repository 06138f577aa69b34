"""Sources: a word in the config -> the files of a data set, in row order."""

from fastrot.data.sources import filelist, folder
from fastrot.data.sources.listing import Listing

_BY_PREFIX = {"list": filelist.open_source}


def open_source(spec: str) -> Listing:
    """List the files of `spec`: a folder of class folders, or list:FILE.

    Raises UserError where there is nothing to read.
    """
    prefix, colon, rest = spec.partition(":")
    if colon and prefix in _BY_PREFIX:
        return _BY_PREFIX[prefix](rest)
    return folder.open_source(spec)
