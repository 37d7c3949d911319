"""The training order: which utterances make up each global batch, and which rank holds them when.

Pure numpy, no input or output. An epoch's order is a function of (seed, epoch) alone; ranks and accumulation only
divide a global batch that is already decided, so the same batches are seen at any world size.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jointfuse.errors import UserError

SORTED_BATCHES = 8  # batches that share one sort by length: enough to pack well, few enough to stay random


@dataclass(frozen=True)
class Plan:
    """Every utterance once an epoch, in global batches of similar length.

    Args:
        lengths: (S,) any measure of an utterance's work; utterances of similar length share a batch.
        batch: utterances in a global batch. The last one of an epoch is filled with repeats marked not valid.
        seed: of the run.
    """

    lengths: np.ndarray
    batch: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.lengths) // self.batch)

    def epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample ids (steps, batch) int64 and whether each counts (steps, batch) bool; rows are sorted by length."""
        if not len(self.lengths):
            raise UserError("the training split is empty: there is nothing to plan")
        rng = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        order = rng.permutation(len(self.lengths))
        full = len(order) // self.batch * self.batch
        window = SORTED_BATCHES * self.batch
        for start in range(0, full, window):
            part = order[start : min(start + window, full)]
            order[start : start + len(part)] = part[np.argsort(self.lengths[part], kind="stable")]
        batches = rng.permutation(order[:full].reshape(-1, self.batch), axis=0)
        valid = np.ones(batches.shape, dtype=bool)
        rest = order[full:]
        if len(rest):
            filled = np.concatenate([rest, np.resize(order, self.batch - len(rest))])
            counts = np.arange(self.batch) < len(rest)
            by_length = np.argsort(self.lengths[filled], kind="stable")
            batches = np.concatenate([batches, filled[by_length][None]])
            valid = np.concatenate([valid, counts[by_length][None]])
        return batches, valid


def micro_batches(batch: np.ndarray, world_size: int, rank: int, accumulation: int) -> np.ndarray:
    """The rows of a global batch that `rank` holds, one row of the result a micro-step.

    Rows sorted by length are cut into `accumulation` runs and each run is dealt to the ranks in turn, so that ranks
    hold equal loads in every micro-step.

    Args:
        batch: (B,) or (B, ...) with B = world_size * accumulation * micro_batch.

    Returns:
        (accumulation, micro_batch, ...)
    """
    assert len(batch) % (world_size * accumulation) == 0
    return batch.reshape(accumulation, -1, world_size, *batch.shape[1:])[:, :, rank]


def evaluation_batches(
    lengths: np.ndarray, batch: int, world_size: int, rank: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Every utterance once, longest first; yields (ids (b,), valid (b,)).

    Batches are the same at any world size, and every rank gets equally many: where there are too few, the last one is
    repeated as not valid, so that sharded parameters are gathered by all ranks together.
    """
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    batches = [order[start : start + batch] for start in range(0, len(order), batch)]
    for start in range(0, len(batches), world_size):
        mine = start + rank
        ids = batches[min(mine, len(batches) - 1)]
        yield ids, np.full(len(ids), mine < len(batches))
