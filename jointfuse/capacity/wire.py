"""Bytes on the wire: the collectives of one steady step, as DeepSpeed and the contrastive loss start them.

A ring sends what is given to an all-gather to every other rank, and what is given to a reduce-scatter once, less a
rank's own share; an all-reduce is both, one after the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jointfuse.capacity.states import Sizes, padded_group
from jointfuse.capacity.zero import ZeroFile

Kind = Literal["all-gather", "all-reduce", "reduce-scatter"]
FEATURE, LABEL, LSE = 4, 8, 4  # bytes: float32, int64, float32
VOTE = 8  # bytes, of train/vote.py
SUB_GROUP = 10**9  # elements that stage 3 updates at a time


@dataclass(frozen=True)
class Collective:
    """All collectives of a step that serve one purpose."""

    purpose: str
    kind: Kind
    given: int  # bytes that one rank gives to them in a step

    def sent(self, ranks: int) -> int:
        """Bytes that leave one rank."""
        shares = {"all-gather": ranks, "all-reduce": 2, "reduce-scatter": 1}[self.kind]
        return round(self.given * shares * (ranks - 1) / ranks)


@dataclass(frozen=True)
class Step:
    """What a rank's share of a step is made of."""

    rows: int  # utterances of a micro-batch
    micro_steps: int
    pool: Literal["step", "micro", "queue"]
    width: int  # D, of a feature; 0 where there is no contrastive loss
    temperature: int  # trained elements of it, 0 or 1
    hears: bool  # clips, not texts alone
    clips: bool  # the gradient norm
    skips: bool  # data.on_error=skip

    @property
    def pools_beforehand(self) -> bool:
        """The whole step is gone through once before it is trained on."""
        return bool(self.width) and self.pool == "step" and self.micro_steps > 1


def collectives(file: ZeroFile, sizes: Sizes, ranks: int, step: Step) -> list[Collective]:
    """Those of one step in which every utterance counts. None where there is one rank.

    Under ZeRO-3 a parameter is gathered once a micro-step, which holds while all of them have fewer elements than
    DeepSpeed keeps until they come again (1e9); see `gathers_more`.
    """
    if ranks == 1:
        return []
    found = _contrast(step) + _gradients(file, sizes, ranks, step) + _parameters(file, sizes, ranks, step)
    found.append(Collective("to stop or go on", "all-reduce", VOTE))
    if step.skips:
        found.append(Collective("how many utterances count", "all-reduce", LABEL))
    return [collective for collective in found if collective.given]


def gathers_more(file: ZeroFile, step: Step) -> bool:
    """Whether DeepSpeed gathers parameters more often than is counted here: passes without gradient between its steps
    make it forget what comes next, and then it gathers at every use."""
    return file.stage == 3 and step.pools_beforehand


def _contrast(step: Step) -> list[Collective]:
    if not step.width:
        return []
    rows = step.rows * step.micro_steps
    return [
        Collective("features, forward", "all-gather", rows * step.width * FEATURE),
        Collective("their labels", "all-gather", rows * LABEL),
        Collective("their log-sum-exps", "all-gather", rows * LSE),
    ]


def _gradients(file: ZeroFile, sizes: Sizes, ranks: int, step: Step) -> list[Collective]:
    groups, n = len(sizes.groups), sizes.trained
    # The temperature has a gradient in the last micro-step alone.
    beforehand = step.temperature if step.pools_beforehand else 0
    often = step.micro_steps if file.stage >= 2 else 1
    looks = file.precision == "fp16" or (file.precision == "bf16" and file.stage in (1, 2))
    overflow = Collective("overflow", "all-reduce", int(looks))
    if file.stage == 0:
        norm = 4 if file.precision == "float32" and step.clips else 0
        return [
            Collective("gradients", "all-reduce", n * file.wire),
            Collective("gradient norm", "all-reduce", norm),
            overflow,
        ]
    if file.keeps_whole_gradients:
        padded = sum(padded_group(group, ranks) for group in sizes.groups)
        return [Collective("gradients", "all-reduce", padded * file.wire)]
    if file.stage < 3:
        given = (often * n - (often - 1) * beforehand) * file.wire
        return [
            Collective("gradients", "all-reduce", given),
            Collective("gradient norm", "all-reduce", 4 * groups),
            overflow,
        ]
    whole = ranks * _parts([size for group in sizes.groups for size in group], ranks)
    norms = sum(-(-_parts(group, ranks) // SUB_GROUP) for group in sizes.groups)
    return [
        Collective("gradients", "reduce-scatter", (often * whole - (often - 1) * ranks * beforehand) * file.wire),
        Collective("gradient norm", "all-reduce", (4 if file.host_optimizer else 8) * norms),
        overflow,
    ]


def _parameters(file: ZeroFile, sizes: Sizes, ranks: int, step: Step) -> list[Collective]:
    if file.stage == 0:
        return []
    if file.stage < 3:
        padded = sum(padded_group(group, ranks) for group in sizes.groups)
        return [Collective("updated parameters", "all-gather", padded // ranks * file.weight)]
    every = [size for group in [*sizes.groups, sizes.frozen] for size in group]
    small = _parts([size for size in every if size <= file.persistent], ranks)
    passes = step.micro_steps * (1 + step.pools_beforehand)
    return [
        Collective("parameters, when used", "all-gather", passes * (_parts(every, ranks) - small) * file.weight),
        Collective("small parameters, updated", "all-gather", small * file.weight),
    ]


def _parts(sizes: Sequence[int], ranks: int) -> int:
    return sum(-(-size // ranks) for size in sizes)
