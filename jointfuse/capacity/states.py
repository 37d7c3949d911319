"""Bytes of weights, gradients and optimizer on one rank, as DeepSpeed keeps them at each stage of ZeRO.

Sizes are numbers of elements. Adam keeps two float32 moments of every trained element, and at all stages but a float32
stage 0 it works on a float32 copy (the masters).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jointfuse.capacity.zero import BUCKET, ZeroFile

ADAM, MASTER = 8, 4  # bytes an element
NORM = 8  # ... of the float64 copy of one tensor at a time of which the gradient's norm is taken


@dataclass(frozen=True)
class Sizes:
    """Of every parameter of a model."""

    groups: list[list[int]]  # the trained ones, as the optimizer groups them
    frozen: list[int]

    @property
    def trained(self) -> int:
        return sum(map(sum, self.groups))

    @property
    def largest(self) -> int:
        return max(size for group in self.groups for size in group)


@dataclass(frozen=True)
class States:
    """Bytes on the device of one rank, and on its host what a file offloads."""

    trained: int  # weights
    frozen: int
    gradients: int  # before the optimizer's step
    optimizer: int
    host: int = 0
    held: int = 0  # of the gradients, while a micro-step goes forward
    buckets: int = 0  # in which gradients wait to be reduced
    gathered: int = 0  # parameters of other ranks, for the time of a micro-step
    reducing: int = 0  # beside gradients and buckets, while these are reduced
    updating: int = 0  # beside gradients, while the optimizer works

    @property
    def resting(self) -> int:
        """Weights and optimizer."""
        return self.trained + self.frozen + self.optimizer


def states(file: ZeroFile, sizes: Sizes, ranks: int, rank: int, accumulates: bool, on_gpu: bool = True) -> States:
    """Of `rank` of so many.

    Args:
        accumulates: several micro-steps make a step.
        on_gpu: buckets count as they are reserved; else as they are written to.
    """
    if file.stage == 0:
        return _whole(file, sizes, accumulates)
    if file.stage == 3:
        return _all_in_parts(file, sizes, ranks, on_gpu)
    if file.keeps_whole_gradients:
        return _optimizer_in_parts(file, sizes, ranks, accumulates)
    return _in_parts(file, sizes, ranks, rank, accumulates, on_gpu)


def _whole(file: ZeroFile, sizes: Sizes, accumulates: bool) -> States:
    n, half = sizes.trained, file.precision != "float32"
    return States(
        trained=file.weight * n,
        frozen=file.weight * sum(sizes.frozen),
        gradients=file.weight * n,
        optimizer=(ADAM + MASTER * half) * n,
        held=file.weight * n * accumulates,
        reducing=file.weight * min(n, BUCKET),
        updating=MASTER * n * half,
    )


def _optimizer_in_parts(file: ZeroFile, sizes: Sizes, ranks: int, accumulates: bool) -> States:
    padded = sum(padded_group(group, ranks) for group in sizes.groups)
    summed, passing = file.gradient * padded, file.weight * sizes.trained
    return States(
        trained=file.weight * padded,
        frozen=file.weight * sum(sizes.frozen),
        gradients=summed + passing,
        optimizer=(ADAM + MASTER) * padded // ranks,
        held=summed + passing * accumulates,
        reducing=(file.gradient + file.wire) * min(padded, BUCKET),
    )


def _in_parts(file: ZeroFile, sizes: Sizes, ranks: int, rank: int, accumulates: bool, on_gpu: bool) -> States:
    padded = [padded_group(group, ranks) for group in sizes.groups]
    part = sum(padded) // ranks
    optimizer, host, gradients = (ADAM + MASTER) * part, 0, 0
    reaching_in = file.weight * sum(_reaching_in(group, ranks, rank) for group in sizes.groups)
    if file.compact:
        gradients = file.gradient * part
    elif not file.host_optimizer:
        gradients = reaching_in
    if file.host_optimizer:
        # There it has float32 gradients too, and a buffer for weights and one for a gradient on their way.
        host = optimizer + (MASTER + file.weight) * part + file.weight * sizes.largest
        host += reaching_in * (accumulates and not file.compact)
        optimizer = file.weight * sizes.largest
    staged = file.gradient if file.stage == 1 else file.weight  # bytes of an element in a bucket
    waiting = staged * min(sizes.trained, file.bucket)
    whole = staged * sizes.trained * (accumulates and file.stage == 1)  # stage 1 sums whole gradients up first
    twice = gradients * (accumulates and file.stage == 2 and not file.compact)
    return States(
        trained=file.weight * sum(padded),
        frozen=file.weight * sum(sizes.frozen),
        gradients=gradients,
        optimizer=optimizer,
        host=host,
        held=(gradients if file.stage == 2 else whole) * accumulates,
        buckets=file.buckets * staged * file.bucket * on_gpu,
        # A bucket is laid out anew before it is sent; where gradients are kept as they are, they come after that.
        reducing=whole + twice + waiting * (not on_gpu) + (waiting if file.compact else max(0, waiting - gradients)),
        updating=0 if file.host_optimizer else max(MASTER * max(padded) // ranks, NORM * sizes.largest),
    )


def _all_in_parts(file: ZeroFile, sizes: Sizes, ranks: int, on_gpu: bool) -> States:
    every = [size for group in sizes.groups for size in group]
    part, frozen_part = _parts(every, ranks), _parts(sizes.frozen, ranks)
    small, frozen_small = (
        ranks * _parts([size for size in these if size <= file.persistent], ranks) for these in (every, sizes.frozen)
    )
    optimizer, gradients, host = (ADAM + MASTER) * part, file.gradient * part, 0
    if file.host_optimizer:
        host = optimizer + gradients + MASTER * part
        optimizer = gradients = 0
    if file.host_weights:
        host += file.weight * (part + frozen_part)
        part = frozen_part = 0
    waiting = file.wire * min(sizes.trained, file.bucket)
    return States(
        trained=file.weight * (part + small),
        frozen=file.weight * (frozen_part + frozen_small),
        gradients=gradients,
        optimizer=optimizer,
        host=host,
        held=gradients,
        buckets=file.wire * file.bucket * on_gpu,
        # What a micro-step comes back to stays for its backward pass; what is frozen is let go.
        gathered=file.weight * max(0, sizes.trained - small + min(sum(sizes.frozen) - frozen_small, file.prefetch)),
        reducing=waiting * (1 + (not on_gpu)),
        updating=0 if file.host_optimizer else MASTER * max(_parts(group, ranks) for group in sizes.groups),
    )


def _parts(sizes: Sequence[int], ranks: int) -> int:
    """Elements on each rank in stage 3, which pads every parameter."""
    return sum(-(-size // ranks) for size in sizes)


def padded_group(group: Sequence[int], ranks: int) -> int:
    """Elements of a group in stages 1 and 2: parts are equal, and begin at multiples of two elements."""
    return -(-sum(group) // (2 * ranks)) * 2 * ranks


def _reaching_in(group: Sequence[int], ranks: int, rank: int) -> int:
    """Elements of the tensors that reach into a rank's part, and of the padding at the end of it."""
    part = padded_group(group, ranks) // ranks
    first, last = rank * part, (rank + 1) * part
    total = end = 0
    for size in group:
        begin, end = end, end + size
        if begin < last and end > first:
            total += size
    return total + max(0, last - max(end, first))


def fullest_rank(file: ZeroFile, sizes: Sizes, ranks: int) -> int:
    """The rank whose gradients take most; 0 where all take the same."""
    if file.stage not in (1, 2) or file.compact or file.host_optimizer:
        return 0
    return max(range(ranks), key=lambda rank: sum(_reaching_in(group, ranks, rank) for group in sizes.groups))
