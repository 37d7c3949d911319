"""Whole dialogues of the same shards, through the same plan and stream: for models that read a dialogue at a time.

reader = DialogueReader(utterances)  # an UtteranceReader
plan = Plan(reader.turns, batch, seed, reader.shard_sizes)
for dialogues in stream(reader, plan.share(epoch, 0, world_size, rank, accumulation), workers): ...
"""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch

from jointfuse.data.batch import HostBatch
from jointfuse.data.plan import Planned
from jointfuse.data.reader import UtteranceReader


@dataclass(frozen=True)
class DialogueBatch:
    """D dialogues of up to T turns, and their U utterances."""

    ids: torch.Tensor  # (D,) int64, running numbers of the split's dialogues
    valid: torch.Tensor  # (D,) bool; false: a repeat that fills the batch
    utterances: HostBatch  # U, dialogue after dialogue, in turn order; those of a repeat are not valid
    places: torch.Tensor  # (D, T) int64: the row of each turn among the utterances; -1 behind a dialogue's end

    def pin_memory(self) -> Self:
        return replace(self, utterances=self.utterances.pin_memory())


class DialogueReader:
    """The dialogues of what an `UtteranceReader` reads, which says how: context, augmentation, what is skipped.

    Args:
        utterances: of a split.
    """

    def __init__(self, utterances: UtteranceReader) -> None:
        self.utterances = utterances
        utterances.split.check_index()
        index = utterances.split.index
        begins = np.flatnonzero(np.diff(index["dialogue"].astype(np.int64), prepend=-1))
        self.first = begins  # (dialogues,) the first utterance of each
        self.turns = np.diff(begins, append=len(index))  # (dialogues,)
        shards = len(utterances.split.shard_sizes)
        self.shard_sizes: list[int] = np.bincount(index["shard"][begins], minlength=shards).tolist()

    def __len__(self) -> int:
        return len(self.first)

    def batch(self, planned: Planned) -> DialogueBatch:
        """The planned dialogues. Raises UserError as `UtteranceReader.batch`."""
        ids, valid = planned
        turns = self.turns[ids]
        starts = np.cumsum(turns) - turns  # (D,) the row where each dialogue begins
        turn = np.arange(turns.sum()) - np.repeat(starts, turns)
        utterances = self.utterances.batch((np.repeat(self.first[ids], turns) + turn, np.repeat(valid, turns)))
        columns = np.arange(turns.max())
        places = np.where(columns < turns[:, None], starts[:, None] + columns, -1)
        return DialogueBatch(torch.from_numpy(ids), torch.from_numpy(valid), utterances, torch.from_numpy(places))
