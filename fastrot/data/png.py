"""A PNG's chunks, without a decoder."""

import struct
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

_CHUNK = struct.Struct(">I4s").unpack_from  # bytes of content, name
_SIGNATURE, _AROUND = 8, 12  # bytes: before the first chunk; of length, name and checksum


def chunks(data: bytes | NDArray[np.uint8]) -> Iterator[tuple[bytes, int]]:
    """(name, where it begins) of each chunk that is whole, in order."""
    view, at = memoryview(data), _SIGNATURE
    while at + _AROUND <= len(data):
        length, name = _CHUNK(view, at)
        if at + _AROUND + length > len(data):
            return
        yield name, at
        at += _AROUND + length


def whole(data: bytes, at: int) -> bytes:
    """The chunk that begins at `at`, with its length, name and checksum."""
    length, _ = _CHUNK(data, at)
    return data[at : at + _AROUND + length]


def ends(data: bytes | NDArray[np.uint8]) -> bool:
    """Whether its end chunk is there; bytes behind it do not count."""
    return any(name == b"IEND" for name, _ in chunks(data))
