"""The learning rate as a function of the step alone, so that a resumed run needs no scheduler state."""

import math

from jointfuse.config import TrainSettings


def lr_factor(settings: TrainSettings, step: int, steps: int) -> float:
    """Factor of every learning rate at `step` (from 0) of `steps`: a linear warm-up, then the chosen decay to 0."""
    warmup = round(settings.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    if settings.decay == "constant":
        return 1.0
    left = (steps - step) / max(1, steps - warmup)
    return left if settings.decay == "linear" else 0.5 * (1 - math.cos(math.pi * left))
