"""Ranks that are asked to stop."""

import json
import os
import signal
from pathlib import Path

from fastrot import distributed
from fastrot.runs.stop import Stop


def heard_at(folder: str) -> None:
    """What each of eight steps hears; rank 1 is asked before step 2, rank 2 before step 3."""
    ranks = distributed.start()
    heard = []
    with Stop(ranks, None) as stop:
        for step in range(8):
            if (ranks.rank, step) in ((1, 2), (2, 3)):
                os.kill(os.getpid(), signal.SIGUSR1 if ranks.rank == 1 else signal.SIGTERM)
            heard.append(stop.heard())
    Path(folder, str(ranks.rank)).write_text(json.dumps(heard))
    distributed.end()
