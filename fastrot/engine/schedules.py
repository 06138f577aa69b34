"""The rate of a step: a pure function of the epoch."""

import math


def lr_at(
    epoch: float,
    *,
    epochs: float,
    peak: float,
    schedule: str,
    warmup_epochs: float = 0.0,
    warmup_ratio: float = 0.0,
    milestones: tuple[float, ...] = (),
    gamma: float = 0.1,
    power: float = 0.9,
    final: float = 0.0,
) -> float:
    """Rate at `epoch` = stream position / rows at the start of a step.

    step    peak * gamma ** (milestones passed)
    cosine  from peak at the end of warm-up to `final` at `epochs`
    poly    (peak - final) * (1 - epoch / epochs) ** power + final
    Warm-up multiplies that by 1 - (1 - warmup_ratio) * (1 - epoch / warmup_epochs).
    Past `epochs` the rate stays. Raises ValueError below 0. Source: protocol "Rotation pretraining", mmcv's LrUpdaterHook.
    """
    if epoch < 0:
        raise ValueError(f"epoch {epoch} is below 0")
    epoch = min(epoch, epochs)
    if schedule == "step":
        rate = peak * gamma ** sum(epoch >= m for m in milestones)
    elif schedule == "cosine":
        done = max(0.0, epoch - warmup_epochs) / (epochs - warmup_epochs)
        rate = final + 0.5 * (peak - final) * (1 + math.cos(math.pi * done))
    elif schedule == "poly":
        rate = (peak - final) * (1 - epoch / epochs) ** power + final
    else:
        raise ValueError(f"schedule {schedule!r} is none of step, cosine, poly")
    if epoch < warmup_epochs:
        rate *= 1 - (1 - warmup_ratio) * (1 - epoch / warmup_epochs)
    return rate
