"""Memory that batches are read and decoded into, used again once nothing refers to it: the system clears each new page,
which takes as long as reading it from memory."""

import weakref
from collections import deque

import numpy as np
from numpy.typing import NDArray

_KEPT = 16  # free ones: more than a loader has batches in flight
_ROOM = 5 / 4  # of what is asked for, so that the next batch fits too


class Arenas:
    """Stretches of bytes, taken and given back by themselves: by the last array that shows a part of one.

    pinned  what a GPU's decoder reads is copied there without a detour.
    """

    def __init__(self, pinned: bool):
        self._pinned = pinned
        self._free: deque[NDArray[np.uint8]] = deque(maxlen=_KEPT)  # its calls are whole: given back in any thread

    def take(self, length: int) -> NDArray[np.uint8]:
        """Undefined bytes, uint8 [length]; free again when neither this array nor a view of it is left."""
        arena = self._fitting(length)
        if arena is None:
            arena = self._made(int(length * _ROOM))
        leased: NDArray[np.uint8] = np.frombuffer(memoryview(arena), np.uint8, length)  # not a view: its views hold it
        weakref.finalize(leased, self._free.append, arena).atexit = False
        return leased

    def _fitting(self, length: int) -> NDArray[np.uint8] | None:
        """One that is large enough; where none is, the first of the free ones makes place for a new one."""
        for _ in range(len(self._free)):
            try:
                arena = self._free.popleft()
            except IndexError:  # another thread's
                return None
            if len(arena) >= length:
                return arena
            self._free.append(arena)
        if len(self._free) == _KEPT:
            self._free.popleft()
        return None

    def _made(self, length: int) -> NDArray[np.uint8]:
        if not self._pinned:
            return np.empty(length, np.uint8)
        import torch  # a second, which reading for indexes need not pay

        pinned: NDArray[np.uint8] = torch.empty(length, dtype=torch.uint8, pin_memory=True).numpy()
        return pinned
