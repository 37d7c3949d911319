"""The training order: which utterances make up each global batch, and which rank holds them when.

Pure numpy, no input or output. An epoch's order is a function of (seed, epoch) alone; ranks and accumulation only
divide a global batch that is already decided, so the same batches are seen at any world size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jointfuse.errors import UserError

MOST_PADDING = 0.05  # share of a batch's positions
SMALLEST_WINDOW, LARGEST_WINDOW = 8, 256  # batches


@dataclass(frozen=True)
class Plan:
    """Every utterance once an epoch, in global batches of similar length.

    Utterances of similar length share a batch: those of a window of batches are sorted together. The wider the window,
    the less padding and the less chance in who meets whom; so it is the narrowest that wastes little.

    Args:
        lengths: (S,) positions that an utterance takes in a batch, in any unit.
        batch: utterances in a global batch. The last one of an epoch is filled with repeats marked not valid.
        seed: of the run.
    """

    lengths: np.ndarray
    batch: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.lengths) // self.batch)

    @cached_property
    def window(self) -> int:
        """Batches that share one sort: 8, doubled until padding takes at most 5 % of the positions, 256 at most."""
        order = self._random(0).permutation(len(self.lengths))[: LARGEST_WINDOW * self.batch]
        order = order[: len(order) // self.batch * self.batch]
        window = SMALLEST_WINDOW
        while window < LARGEST_WINDOW and window * self.batch < len(order):
            if padding(self.lengths, self._sorted(order, window).reshape(-1, self.batch)) <= MOST_PADDING:
                break
            window *= 2
        return window

    def epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample ids (steps, batch) int64 and whether each counts (steps, batch) bool; rows are sorted by length."""
        if not len(self.lengths):
            raise UserError("the training split is empty: there is nothing to plan")
        rng = self._random(epoch)
        order = rng.permutation(len(self.lengths))
        full = len(order) // self.batch * self.batch
        batches = rng.permutation(self._sorted(order[:full], self.window).reshape(-1, self.batch), axis=0)
        valid = np.ones(batches.shape, dtype=bool)
        rest = order[full:]
        if len(rest):
            filled = np.concatenate([rest, np.resize(order, self.batch - len(rest))])
            counts = np.arange(self.batch) < len(rest)
            by_length = np.argsort(self.lengths[filled], kind="stable")
            batches = np.concatenate([batches, filled[by_length][None]])
            valid = np.concatenate([valid, counts[by_length][None]])
        return batches, valid

    def _random(self, epoch: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self.seed, epoch]))

    def _sorted(self, order: np.ndarray, window: int) -> np.ndarray:
        """(S,) utterances in order -> the same, sorted by length within each window of so many batches."""
        order = order.copy()
        for start in range(0, len(order), window * self.batch):
            part = order[start : start + window * self.batch]
            part[:] = part[np.argsort(self.lengths[part], kind="stable")]
        return order


def padding(lengths: np.ndarray, batches: np.ndarray) -> float:
    """Share of the positions of batches (steps, B), each as wide as its longest utterance, that are padding; 0 to 1."""
    held = lengths[batches].astype(np.float64)
    positions = held.max(axis=1, initial=0).sum() * batches.shape[1]
    return 1 - held.sum() / positions if positions else 0.0


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
