"""How fast this machine computes and communicates, where nobody says how fast another one does."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from jointfuse.bench.device import device, device_name, matmul_rate, seconds
from jointfuse.bench.ranks import on_ranks

SENT = {"cuda": 2**28, "cpu": 2**22}  # bytes of the all-reduce that is timed
REPEATS = 5


@dataclass(frozen=True)
class Rates:
    """Of one rank, and where each figure is from."""

    operations: float  # a second, in large matrix products
    bandwidth: float | None  # bytes a second that leave a rank; None: not known
    operations_from: str
    bandwidth_from: str
    share: float  # of that rate of operations, what a whole step reaches

    @property
    def reached(self) -> float:
        """Operations a second in a step."""
        return self.operations * self.share


def measured_rates(tera: float | None, giga: float | None, share: float, dtype: torch.dtype, ranks: int) -> Rates:
    """What was given, 10^12 operations and 10^9 bytes a second; the rest is measured here."""
    operations, operations_from = (tera or 0.0) * 1e12, "given"
    if not tera:
        operations, operations_from = matmul_rate(dtype), f"measured: {device_name()}, {str(dtype).split('.')[1]}"
    if giga or ranks == 1:
        return Rates(operations, (giga or 0.0) * 1e9 or None, operations_from, "given" if giga else "one rank", share)
    here = min(ranks, torch.cuda.device_count() if torch.cuda.is_available() else min(2, os.cpu_count() or 1))
    if here < 2:
        return Rates(
            operations, None, operations_from, "not known: this machine has one device; give --bandwidth", share
        )
    measured = min(on_ranks(here, _ring_rate))
    return Rates(operations, measured, operations_from, f"measured: {here} ranks of this machine", share)


def _ring_rate() -> float:
    """Bytes a second that leave this rank in an all-reduce; the best of several."""
    sent = SENT[device().type]
    given = torch.ones(sent // 4, device=device())
    dist.all_reduce(given)
    fastest = min(seconds(lambda: dist.all_reduce(given)) for _ in range(REPEATS))
    ranks = dist.get_world_size()
    return 2 * sent * (ranks - 1) / ranks / fastest
