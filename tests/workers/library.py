"""What a test does with `fastrot.Loader` in a process of its own."""

import json
import os
from pathlib import Path

import numpy as np

import fastrot


def go_on(source: str, state: str, images: int, steps: int, out: str) -> None:
    """Take `steps` steps from a saved state as this rank of all; out/RANK-STEP.npz gets what they hold."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with fastrot.Loader(fastrot.open(source), images, 20, seed=7, rank=rank, ranks=ranks, views="one") as loader:
        loader.load_state_dict(json.loads(Path(state).read_text()))
        taken = 0
        while taken < steps:
            for batch in loader:
                arrays = {name: getattr(batch, name).numpy() for name in ("pixels", "labels", "flips", "turns")}
                np.savez(Path(out) / f"{rank}-{batch.step}.npz", rows=batch.rows, **arrays)
                if (taken := taken + 1) == steps:
                    break
