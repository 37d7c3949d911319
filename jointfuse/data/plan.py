"""The training order: which utterances make up each global batch, and which rank holds them when.

Pure numpy, no input or output. An epoch's order is a function of the index, the seed and the epoch; ranks and
accumulation only divide a global batch that is already decided, so the same batches are seen at any world size.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np

from jointfuse.errors import UserError

MOST_PADDING = 0.05  # share of a batch's positions
SMALLEST_WINDOW, LARGEST_WINDOW = 8, 256  # batches

Planned = tuple[np.ndarray, np.ndarray]  # ids (b,) int64, valid (b,) bool


class Numbers(Protocol):
    """A number for each utterance of a split: an array, or what computes them when asked."""

    def __len__(self) -> int: ...

    def __getitem__(self, ids: np.ndarray, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Plan:
    """Every utterance once an epoch, in global batches of similar length.

    An epoch takes the shards in random order and cuts them into blocks; the utterances of a block are shuffled. So
    reading stays within the shards of a block, and whoever wants one batch computes one block. Utterances of similar
    length share a batch: those of a window of batches are sorted together. The wider the window, the less padding and
    the less chance in who meets whom; so it is the narrowest that wastes little.

    Args:
        lengths: positions that each of the S utterances takes in a batch, in any unit, in index order.
        batch: utterances in a global batch. The last one of an epoch is filled with repeats marked not valid.
        seed: of the run.
        shards: utterances of each shard, in index order; all of them are in one where it is left out.
        block: utterances that are shuffled together; whole shards, so it may be a shard more.
        weights: how often each utterance is drawn, relative to the others; each exactly once where they are left out.
            An utterance comes twice in a batch only where it is drawn more often than there are batches in a window:
            beside its copy it would teach a contrastive loss nothing.
    """

    lengths: Numbers
    batch: int
    seed: int
    shards: Sequence[int] = ()
    block: int = 2**16
    weights: Numbers | None = None

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.lengths) // self.batch)

    @cached_property
    def window(self) -> int:
        """Batches that share one sort: 8, doubled until padding takes at most 5 % of the positions, 256 at most."""
        order = self._blocks(0).shuffled(0, self._random(0, 0))[: LARGEST_WINDOW * self.batch]
        lengths = self.lengths[order[: len(order) // self.batch * self.batch]]
        window = SMALLEST_WINDOW
        while window < LARGEST_WINDOW and window * self.batch < len(lengths):
            if padding(lengths, _sorted(lengths, window * self.batch).reshape(-1, self.batch)) <= MOST_PADDING:
                break
            window *= 2
        return window

    def batches(self, epoch: int, start: int = 0) -> Iterator[Planned]:
        """The global batches of an epoch from number `start` on: ids (batch,) and whether each counts (batch,); rows
        are sorted by length.

        Raises:
            UserError: there are no utterances.
        """
        if not len(self.lengths):
            raise UserError("the training split is empty: there is nothing to plan")
        if start >= self.steps_per_epoch:
            return
        blocks = self._blocks(epoch)
        done = start * self.batch
        first = int(np.searchsorted(blocks.before, done, side="right")) - 1
        every = np.ones(self.batch, dtype=bool)
        begun = np.empty(0, dtype=np.int64)  # of a batch over the edge of blocks
        for number in range(first, len(blocks.before)):
            head, whole, tail = self._block(epoch, blocks, number)
            if number == first:
                head, whole = head[:0], whole[(done - blocks.before[first] - len(head)) // self.batch :]
            begun = np.concatenate([begun, head])
            if len(begun) == self.batch:
                yield self._by_length(begun, every)
                begun = begun[:0]
            for ids in whole:
                yield ids, every
            begun = np.concatenate([begun, tail])
        if len(begun):
            repeats = np.resize(blocks.shuffled(0, self._random(epoch, 0)), self.batch - len(begun))
            yield self._by_length(np.concatenate([begun, repeats]), np.arange(self.batch) < len(begun))

    def counted(self, number: int) -> int:
        """Utterances of an epoch's batch `number` that count."""
        return min(self.batch, len(self.lengths) - number * self.batch)

    def share(self, epoch: int, start: int, world_size: int, rank: int, accumulation: int) -> Iterator[Planned]:
        """What `rank` holds of `batches(epoch, start)`: `accumulation` micro-batches of each."""
        for batch in self.batches(epoch, start):
            yield from zip(*(micro_batches(part, world_size, rank, accumulation) for part in batch), strict=True)

    def _random(self, epoch: int, block: int | None = None) -> np.random.Generator:
        """What orders the shards of an epoch, or the utterances of one of its blocks."""
        # data/augment.py has the same key, and of the counters those whose second number is not 0.
        counter = [0, 0, 0, 1] if block is None else [0, 0, block, 0]
        return np.random.Generator(np.random.Philox(key=[self.seed, epoch], counter=counter))

    def _blocks(self, epoch: int) -> "_Blocks":
        first, sizes = self._spans
        order = self._random(epoch).permutation(len(sizes))
        before = np.cumsum(sizes[order]) - sizes[order]
        _, cuts = np.unique(before // self.block, return_index=True)
        held = np.add.reduceat((sizes if self.weights is None else self._shard_weights)[order], cuts)
        until = np.rint(np.cumsum(held) * (len(self.lengths) / held.sum())).astype(np.int64)
        drawn = np.diff(until, prepend=0)
        return _Blocks(first, sizes, np.split(order, cuts[1:]), drawn, until - drawn)

    @cached_property
    def _spans(self) -> tuple[np.ndarray, np.ndarray]:
        """(shards,) the first utterance of each shard and how many it has."""
        sizes = np.asarray(self.shards if len(self.shards) else [len(self.lengths)], dtype=np.int64)
        return np.cumsum(sizes) - sizes, sizes

    @cached_property
    def _shard_weights(self) -> np.ndarray:
        """(shards,) what the weights of a shard's utterances come to."""
        assert self.weights is not None
        spans = zip(*self._spans, strict=True)
        return np.array([self.weights[np.arange(first, first + size)].sum() for first, size in spans])

    def _block(self, epoch: int, blocks: "_Blocks", number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The ids of a block as they are trained on: those (h,) that complete the batch which the block before began,
        whole batches (n, batch), and those (t,) that begin one."""
        random = self._random(epoch, number)
        order = blocks.shuffled(number, random)
        if self.weights is not None:
            order = random.permutation(_drawn(order, self.weights[order], blocks.drawn[number], random.uniform()))
        head = min(int(-blocks.before[number] % self.batch), len(order))
        tail = head + (len(order) - head) // self.batch * self.batch
        whole = order[head:tail]
        whole = whole[_sorted(self.lengths[whole], self.window * self.batch)].reshape(-1, self.batch)
        if self.weights is not None:
            for start in range(0, len(whole), self.window):
                _part_copies(whole[start : start + self.window])
            whole = np.take_along_axis(whole, np.argsort(self.lengths[whole], axis=1, kind="stable"), axis=1)
        return order[:head], random.permutation(whole, axis=0), order[tail:]

    def _by_length(self, ids: np.ndarray, valid: np.ndarray) -> Planned:
        order = np.argsort(self.lengths[ids], kind="stable")
        return ids[order], valid[order]


class _Blocks(NamedTuple):
    """The blocks of an epoch."""

    first: np.ndarray  # (shards,) the first utterance of each shard
    size: np.ndarray  # (shards,)
    shards: list[np.ndarray]  # of each block
    drawn: np.ndarray  # (blocks,) utterances of an epoch that are drawn from each
    before: np.ndarray  # (blocks,) those of the blocks before it

    def shuffled(self, number: int, random: np.random.Generator) -> np.ndarray:
        """(n,) ids of a block in random order."""
        shards = np.sort(self.shards[number])
        spans = zip(self.first[shards], self.size[shards], strict=True)
        return random.permutation(np.concatenate([np.arange(first, first + size) for first, size in spans]))


def _sorted(lengths: np.ndarray, window: int) -> np.ndarray:
    """(n,) -> (n,): places sorted by length within each window of so many utterances."""
    places = np.arange(len(lengths))
    for start in range(0, len(places), window):
        places[start : start + window] = start + np.argsort(lengths[start : start + window], kind="stable")
    return places


def _drawn(ids: np.ndarray, weights: np.ndarray, number: int, start: float) -> np.ndarray:
    """(n,) -> (number,): each id as often as its share of the weights says, rounded up or down, and so are all the ids
    of a weight together (systematic sampling; Madow 1949)."""
    order = np.argsort(weights, kind="stable")
    until = np.cumsum(weights[order]) * (number / weights.sum())
    until[-1:] = number
    return np.repeat(ids[order], np.diff(np.floor(until + start).astype(np.int64), prepend=0))


def _part_copies(batches: np.ndarray) -> None:
    """Have no id twice in a batch (K, B), from short to long, if that can be: in place, by exchanging it with one of
    the nearest batch, and there with the nearest in length."""
    held = [Counter(batch) for batch in batches.tolist()]
    for number, batch in enumerate(batches):
        for place, id in enumerate(batch.tolist()):
            if held[number][id] == 1:
                continue
            for other in sorted(range(len(batches)), key=lambda other: abs(other - number))[1:]:
                if id in held[other]:
                    continue
                places = range(len(batch)) if other > number else reversed(range(len(batch)))
                found = next((p for p in places if int(batches[other, p]) not in held[number]), None)
                if found is None:
                    continue
                exchanged = int(batches[other, found])
                batch[place], batches[other, found] = exchanged, id
                for counter, gone, come in ((held[number], id, exchanged), (held[other], exchanged, id)):
                    counter[come] += 1
                    counter[gone] -= 1
                    if not counter[gone]:
                        del counter[gone]
                break


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
