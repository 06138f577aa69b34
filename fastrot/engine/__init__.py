"""The step: backward, step, state, load_state, reduce. Plain torch is DeepSpeed's oracle."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from fastrot.distributed import Ranks
from fastrot.errors import UserError, why_not_there

if TYPE_CHECKING:
    from fastrot.engine.base import Engine


@dataclass(frozen=True)
class StepSettings:
    """precision fp32, tf32, bf16 or fp16 (the last two: autocast over fp32 weights); zero 0 or 1; clip a norm or None.

    channels_last  layout of the weights; under ZeRO 1 they are slices of one flat buffer and keep
    torch's default, which only costs the convolutions a copy of their filters.
    cuda_graphs    forward and backward are replayed from graphs, which add gradients where they lay at capture.
    bucket_mb      gradients are averaged over ranks in buckets of so many MiB during the backward pass (under ZeRO 1
    after it); 0, and under cuda_graphs: in one piece after it.
    average_statistics  a step makes norms' running statistics the mean over ranks: where they do not all see the same
    views, so that every rank evaluates, saves and resumes the same network.
    loss_scale  of fp16, fixed; None: it moves.
    """

    precision: str = "fp32"
    zero: int = 0
    clip: float | None = None
    momentum: float = 0.9
    channels_last: bool = True
    cuda_graphs: bool = False
    bucket_mb: float = 25.0
    average_statistics: bool = False
    loss_scale: float | None = None


AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def make_engine(
    kind: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: StepSettings,
    ranks: Ranks,
    batch: dict[str, int],
    deepspeed_config: str | None = None,
) -> "Engine":
    """A DeepSpeedEngine or PlainEngine over a model on its device.

    batch             DeepSpeed's names for the step's arithmetic (train_batch_size, ...).
    deepspeed_config  the user's own JSON file, if any.
    """
    if kind == "plain":
        if deepspeed_config:
            raise UserError("--deepspeed_config is for engine.kind deepspeed; engine.kind is plain")
        from fastrot.engine.plain import PlainEngine

        engine: Engine = PlainEngine(model, optimizer, settings, ranks)
        engine.hold_scale()
        return engine
    from fastrot.engine.deepspeed import DeepSpeedEngine

    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise UserError(f"engine.kind deepspeed: {why_not_there(error)}, or set engine.kind=plain") from None
    engine = DeepSpeedEngine(model, optimizer, settings, ranks, batch, deepspeed_config)
    engine.hold_scale()
    return engine
