"""The pool of the contrastive loss: how many meet, how many meet none of their class, what it takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, lgamma

from jointfuse.capacity.wire import Step

ROW = 40  # bytes of a row beside its feature: label, class, partners, weights, log-sum-exp
TILE = 1024  # rows and columns of similarities held at once on a CPU ...
PANEL = 256 * 2**20  # ... and bytes of them on a GPU
COPIES = 3  # of a tile of similarities, where they become coefficients


@dataclass(frozen=True)
class Pool:
    """One pool; `a_step` of them make a step."""

    anchors: int
    keys: int  # the anchors, and what a queue holds
    a_step: int
    own: int  # anchors of one rank

    def held(self, width: int) -> int:
        """Bytes from its forward to its backward pass."""
        return (self.keys + self.own) * width * 4 + self.keys * ROW

    def passing(self, width: int, on_gpu: bool) -> int:
        """Bytes in its backward pass beside those: weighted features, gradients, similarities."""
        tile = COPIES * 4 * min(self.own, TILE) * min(self.keys, TILE)
        similarities = min(PANEL, 4 * self.own * self.keys) if on_gpu else tile
        return (self.anchors + 2 * self.own) * width * 4 + similarities

    def operations(self, width: int) -> int:
        """Of one rank, forward and backward."""
        return 6 * self.own * self.keys * width


def pool_of(step: Step, ranks: int, queue: int) -> Pool | None:
    """None where there is no contrastive loss."""
    if not step.width:
        return None
    own = step.rows * (step.micro_steps if step.pool == "step" else 1)
    anchors = own * ranks
    return Pool(anchors, anchors + queue, 1 if step.pool == "step" else step.micro_steps, own)


def share_without_partner(counts: Sequence[int], keys: int, shares: Sequence[float] | None = None) -> float:
    """The expected share of anchors with no other key of their class in a pool.

    Args:
        counts: utterances of each class; the pool is drawn from them without replacement.
        keys: K; all utterances there are where it is more.
        shares: of each class, where utterances are drawn one by one instead.
    """
    if shares is not None:
        return sum(share * (1 - share) ** (keys - 1) for share in shares)
    return sum(count / sum(counts) * _alone(count, sum(counts), keys) for count in counts if count)


def _alone(count: int, total: int, keys: int) -> float:
    """The probability that none of the K - 1 others, drawn from all but the anchor, is one of its `count` - 1 likes."""
    drawn = min(keys, total) - 1
    if drawn > total - count:
        return 0.0
    return exp(_ways(total - count, drawn) - _ways(total - 1, drawn))


def _ways(total: int, drawn: int) -> float:
    """The logarithm of the number of ways to draw so many."""
    return lgamma(total + 1) - lgamma(drawn + 1) - lgamma(total - drawn + 1)
