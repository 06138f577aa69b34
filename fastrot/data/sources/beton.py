"""An FFCV file, NAME.beton: JPEG, raw pixels, or both."""

import os

import numpy as np

from fastrot.data import beton
from fastrot.data.sources.listing import Listing
from fastrot.remote import absolute


def open_source(name: str) -> Listing:
    """Samples in their order, each a stretch of the file; its int field is the label.

    Raises UserError with what is wrong with the file; nothing of it is used before it is checked.
    """
    table = beton.read_table(name)
    raw = table.mode == beton.RAW
    return Listing(
        [os.fsencode(absolute(name))],
        np.zeros(len(raw), np.int64),
        table.offset,
        table.length,
        table.label,
        [],
        raw_shape=np.where(raw[:, None], np.stack([table.height, table.width], 1), 0),
    )
