"""Laps of parts of the data path."""

import numpy as np
import pytest

from fastrot.data.decode.batch import Batch
from fastrot.profiling.stages import decoding

BATCH = Batch([np.zeros(3, np.uint8)], np.ones(1, np.uint8), np.zeros((1, 4), np.int32), 8)


class Decoder:
    """Counts what is in flight; stopped in the middle of its n-th result, as by Ctrl-C."""

    def __init__(self, stops: int):
        self.flying, self.left = 0, stops

    def submit(self, batch: Batch) -> None:
        self.flying += 1

    def result(self) -> None:
        assert self.flying
        self.flying, self.left = self.flying - 1, self.left - 1
        if not self.left:
            self.flying = 0
            raise KeyboardInterrupt


def test_a_decoder_is_left_empty():
    decoder = Decoder(-1)
    assert len(decoding([BATCH], decoder, 1e-3).paces) == 5
    assert decoder.flying == 0


def test_a_decoder_that_is_stopped_is_asked_no_more():
    with pytest.raises(KeyboardInterrupt):
        decoding([BATCH], Decoder(3), 1e-3)
