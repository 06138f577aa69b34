"""Where a start goes on: the checkpoint of rank 0's folder or of a mirror, on every rank."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fastrot import distributed
from fastrot.distributed import Ranks
from fastrot.errors import UserError
from fastrot.runs import checkpoint
from fastrot.runs.mirror import holds, take
from fastrot.sending import read_by_all


def resume_point(
    resume: str, folder: Path, mirror: str | None, ranks: Ranks, say: Callable[[str], None]
) -> checkpoint.Checkpoint | None:
    """The checkpoint that rank 0 finds, on every rank; None where a run begins. Collective.

    resume  as in checkpoint.find.    say: called on rank 0 with a line for what was brought or passed over.
    Raises UserError, also where another node holds a later one.
    """
    path = distributed.on_first(ranks, lambda: _find(resume, folder, mirror, say))
    newest = distributed.of_all(ranks, checkpoint.newest_step(folder))
    if resume == "auto" and max(newest) > newest[0]:
        rank = newest.index(max(newest))
        raise UserError(
            f"run.out {folder}: the node of rank {rank} holds step {newest[rank]:,}, that of rank 0 "
            + (f"step {newest[0]:,}" if newest[0] >= 0 else "no checkpoint")
            + "; put run.out on a disk that all nodes see, or start rank 0 there"
        )
    if path is None:
        return None
    with read_by_all(ranks, lambda: path) as here:
        return replace(checkpoint.load(here), path=path)


def _find(resume: str, folder: Path, mirror: str | None, say: Callable[[str], None]) -> Path | None:
    if mirror and resume == "auto":
        take(mirror, folder, say)
    if mirror and resume == "never" and (name := holds(mirror)):
        raise UserError(f"run.mirror {mirror}: holds a run at {name}; choose another, or --resume auto")
    return checkpoint.find(resume, folder, say)
