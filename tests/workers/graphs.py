"""CUDA's part in capturing a graph, played on the host."""

from contextlib import contextmanager

import torch


class OnTheHost:
    """A capture that runs nothing, and a replay that runs the work on what was held: as CUDA's."""

    def __init__(self, sums: int = 9):
        self.captured = self.beside_runs = 0
        self._sums = sums

    def __call__(self, work):
        self.captured += 1
        result = torch.full((self._sums,), torch.nan, dtype=torch.float64)
        return lambda: result.copy_(work()), result

    @contextmanager
    def beside(self):
        self.beside_runs += 1
        yield
