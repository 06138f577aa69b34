"""Which row stands at which position of the endless stream: permutations computed, never stored."""

import numpy as np
from numpy.typing import NDArray

from fastrot.data.randomness import ORDER, philox

_ROUNDS = 8


def _round_keys(seed: int, epoch: int, first: int) -> NDArray[np.uint32]:
    """The eight round keys, uint32 [8]; `first` is the key row of round 0."""
    return philox(seed, first + np.arange(_ROUNDS), epoch, ORDER)[:, 0]


def _mix(half: NDArray[np.uint32], key: np.uint32, mask: np.uint32) -> NDArray[np.uint32]:
    """Round function: MurmurHash3's 32-bit finaliser of half * golden ratio + key, modulo 2**32."""
    h = half * np.uint32(0x9E3779B1)
    h += key
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x85EBCA6B)
    h ^= h >> np.uint32(13)
    h *= np.uint32(0xC2B2AE35)
    h ^= h >> np.uint32(16)
    h &= mask
    return h


def _permute(
    positions: NDArray[np.int64], n: int, keys: NDArray[np.uint32], *, inverse: bool = False
) -> NDArray[np.int64]:
    """A permutation of range(n) at `positions` (or its inverse), in O(1) memory.

    A balanced Feistel network over the next even power of two; results outside range(n) walk on
    along their cycle, which keeps it a permutation (Black and Rogaway, CT-RSA 2002).
    """
    half = max(1, -(-(n - 1).bit_length() // 2))
    bits, mask = np.uint64(half), np.uint32((1 << half) - 1)
    out = positions.astype(np.uint64)
    todo = np.ones(out.shape, bool)
    while todo.any():
        here = out[todo]
        left, right = (here >> bits).astype(np.uint32), here.astype(np.uint32) & mask
        for key in keys[::-1] if inverse else keys:
            if inverse:
                left, right = right ^ _mix(left, key, mask), left
            else:
                left, right = right, left ^ _mix(right, key, mask)
        out[todo] = left.astype(np.uint64) << bits | right
        todo = out >= np.uint64(n)
    return out.astype(np.int64)


class FullOrder:
    """Every epoch its own permutation of all n rows."""

    def __init__(self, n: int, seed: int):
        self.n, self.seed = n, seed

    def rows(self, positions: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """Rows at `positions` (0 .. n-1) of an epoch, int64, same shape."""
        return _permute(positions, self.n, _round_keys(self.seed, epoch, 0))


class WindowOrder:
    """Chunks of neighbours permuted; rows permuted only inside windows of several chunks.

    For disks that read neighbours faster: the rows of a window lie in `chunks` stretches of
    `chunk_rows` rows. The last chunk may be short, and may come anywhere in the chunk order.
    """

    def __init__(self, n: int, seed: int, chunk_rows: int, chunks: int):
        self.n, self.seed = n, seed
        self.chunk_rows, self.chunks = chunk_rows, chunks

    def rows(self, positions: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """Rows at `positions` (0 .. n-1) of an epoch, int64, same shape."""
        size, count = self.chunk_rows, -(-self.n // self.chunk_rows)
        missing = size * count - self.n
        chunk_keys = _round_keys(self.seed, epoch, 1 << 32)
        short = int(_permute(np.array([count - 1]), count, chunk_keys, inverse=True)[0])

        span = self.chunks * size
        after_short = positions >= (short // self.chunks + 1) * span - missing
        windows = (positions + missing * after_short) // span
        rows = np.empty(positions.shape, np.int64)
        for window in np.unique(windows):
            here = windows == window
            first = int(window) * self.chunks
            in_window = min(self.chunks, count - first)
            holds_short = first <= short < first + in_window
            start = first * size - (missing if short < first else 0)
            length = in_window * size - (missing if holds_short else 0)
            keys = _round_keys(self.seed, epoch, (2 << 32) + _ROUNDS * int(window))
            place = _permute(positions[here] - start, length, keys)
            if holds_short:  # rows behind the short chunk stand as if it were whole
                place += missing * (place >= (short - first + 1) * size - missing)
            chunk = _permute(first + place // size, count, chunk_keys)
            rows[here] = chunk * size + place % size
        return rows
