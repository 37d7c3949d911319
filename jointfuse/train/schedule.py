"""The learning rate as a function of the step alone, so that a resumed run needs no scheduler state."""

import math

from jointfuse.config import TrainSettings


def lr_factor(settings: TrainSettings, step: int, steps: int, warmup: int | None = None) -> float:
    """Factor of every learning rate at `step` (from 0) of `steps`: a linear warm-up, then the chosen decay to 0.

    Args:
        warmup: steps of it; `train.warmup` of all steps unless given.
    """
    warmup = round(settings.warmup * steps) if warmup is None else warmup
    if step < warmup:
        return (step + 1) / warmup
    if settings.decay == "constant":
        return 1.0
    left = (steps - step) / max(1, steps - warmup)
    return left if settings.decay == "linear" else 0.5 * (1 - math.cos(math.pi * left))


def describe_longer(settings: TrainSettings, step: int, before: int, steps: int, warmup: int) -> str:
    """What becomes of the learning rate of a run of `before` steps that goes on behind `step` for `steps`."""
    old, new = (lr_factor(settings, min(step, length), length, warmup) for length in (before, steps))
    begun = "its warm-up stays as it was" if step < warmup else "its warm-up is over"
    if settings.decay == "constant":
        follows = "stays as it is"
    else:
        follows = f"is {new:.0%} of train.lr from here, where it was {old:.0%}, and falls to 0 at the new end"
    return f"goes on to step {steps} in place of {before}: the learning rate {follows}; {begun}"
