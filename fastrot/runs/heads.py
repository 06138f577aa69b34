"""`fastrot linear --checkpoint`: the protocol's heads on a frozen backbone, trained in a run folder like any other."""

from functools import partial
from typing import Any

from fastrot.config import Config
from fastrot.distributed import Ranks
from fastrot.errors import UserError
from fastrot.runs import transfer
from fastrot.runs.transfer import Learning, TransferJob
from fastrot.tasks.linear import LinearTask


class LinearJob(TransferJob):
    """A job that learns heads."""

    def make_task(self) -> LinearTask:
        config, begin = self.config, self.begin
        self.say(begin.origin.says())
        return LinearTask(
            begin.backbone,
            config.linear.taps,
            config.linear.pool,
            config.data.crop,
            begin.classes,
            config.data.mean,
            config.data.std,
            self.ranks.device,
            config.run.seed,
            config.linear.jitter,
            config.linear.lighting,
        )


def prepared(checkpoint: str | None, seed: int | None, config: Config, ranks: Ranks) -> Learning:
    """What the run begins from, and what makes its job. Raises UserError.

    checkpoint  of the backbone, or None for the control drawn from `seed`.
    """
    if config.engine.kind != "plain":
        raise UserError(
            "fastrot linear: engine.kind must be plain: DeepSpeed keeps no state for frozen weights; "
            "configs/linear_in1k.yaml has it"
        )
    begin = transfer.start("linear", checkpoint, seed, config, ranks)
    return Learning(begin, partial(LinearJob, begin), begin.defining("linear"))


def train_heads(checkpoint: str | None, seed: int | None, config: Config, ranks: Ranks, resume: str) -> dict[str, Any]:
    """Train, or go on training, in run.out. Returns what --json prints. Raises UserError. Arguments as in `prepared`."""
    return prepared(checkpoint, seed, config, ranks).train(ranks, resume)
