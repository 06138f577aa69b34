"""Counter-based random numbers: no state, so an image's fate depends on (seed, epoch, row) alone."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Purposes: each use of chance has its own counters, so adding one never shifts another.
ORDER, CROP, FLIP, TURN, JITTER, LIGHTING, DRAW, SCALE, PLACE, PHOTOMETRIC = range(10)
RECODE, FRINGE, BORDER, BLUR = range(10, 14)

_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85


def philox(seed: int, rows: ArrayLike, epochs: ArrayLike, purpose: int, block: int = 0) -> NDArray[np.uint32]:
    """Philox4x32-10 words x0..x3 for each row, uint32 [n, 4].

    seed    0 .. 2**64 - 1: the key, low word first.
    rows    int64 [n]; epochs int64, broadcast against rows.
    Counter (row low, row high, epoch, purpose * 2**16 + block).
    Source  Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11.
    """
    rows, epochs = np.broadcast_arrays(np.atleast_1d(rows), epochs)
    rows, epochs = rows.astype(np.uint64), epochs.astype(np.uint64)
    c0, c1, c2 = rows & _LOW, rows >> _32, epochs & _LOW
    c3 = np.full_like(c0, purpose << 16 | block)
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (b >> _32) ^ c1 ^ np.uint64(key[0]), b & _LOW
        c2, c3 = (a >> _32) ^ c3 ^ np.uint64(key[1]), a & _LOW
        key = [(k + w) & 0xFFFFFFFF for k, w in zip(key, _WEYL, strict=True)]
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def uniform(words: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Words as float64 in [0, 1), same shape: x * 2**-32, exact."""
    return words.astype(np.float64) * 2.0**-32


def below(words: NDArray[np.uint32], n: ArrayLike) -> NDArray[np.int64]:
    """Integers in [0, n), same shape as words: (x * n) >> 32."""
    return ((words.astype(np.uint64) * np.asarray(n).astype(np.uint64)) >> _32).astype(np.int64)
