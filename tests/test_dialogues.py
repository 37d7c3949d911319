"""Whole dialogues through the plan and the stream."""

from collections.abc import Sequence
from itertools import chain, zip_longest

import numpy as np
import pytest
import torch
from helpers import planned_epoch, reader_of

from jointfuse.data.dialogues import DialogueBatch, DialogueReader
from jointfuse.data.plan import Plan
from jointfuse.data.shards import Corpus
from jointfuse.data.stream import stream

BATCH, EPOCH = 4, 2


def dialogues_of(corpus: Corpus) -> tuple[DialogueReader, Plan]:
    reader = DialogueReader(reader_of(corpus, "both"))
    return reader, Plan(reader.turns, BATCH, seed=1, shards=reader.shard_sizes, block=3)


def turns(corpus: Corpus) -> list[list[tuple[int, str]]]:
    """(utterance, key) of each dialogue's turns, by the words of the utterances themselves."""
    split = corpus.split("train")
    found: dict[str, list[tuple[int, str]]] = {}
    for id in range(len(split)):
        utterance = split.sample(id, audio=False)
        found.setdefault(utterance.dialogue, []).append((id, utterance.key))
    return list(found.values())


def held(batch: DialogueBatch) -> list[list[int]]:
    """Ids of the utterances of each dialogue, as `places` finds them."""
    return [batch.utterances.ids[row[row >= 0]].tolist() for row in batch.places]


def test_a_batch_has_the_turns_of_its_dialogues_in_order(uneven_corpus: Corpus) -> None:
    reader, plan = dialogues_of(uneven_corpus)
    expected = [[id for id, _ in dialogue] for dialogue in turns(uneven_corpus)]
    assert [len(dialogue) for dialogue in expected] == reader.turns.tolist() == [4, 4, 4, 4, 4, 3]
    seen = []
    for batch in stream(reader, plan.batches(EPOCH), 0):
        assert held(batch) == [expected[dialogue] for dialogue in batch.ids.tolist()]
        assert batch.places.shape == (BATCH, max(map(len, held(batch))))
        assert batch.utterances.valid.tolist() == list(
            chain.from_iterable(
                [counts] * len(row) for counts, row in zip(batch.valid.tolist(), held(batch), strict=True)
            )
        )
        seen += batch.ids[batch.valid].tolist()
    assert sorted(seen) == list(range(len(expected))), "each once, the last batch filled with what does not count"


def test_its_utterances_are_those_that_are_read_one_by_one(uneven_corpus: Corpus) -> None:
    reader, _ = dialogues_of(uneven_corpus)
    batch = reader.batch((np.array([5, 0]), np.array([True, True])))
    alone = reader.utterances.batch((batch.utterances.ids.numpy(), np.ones(7, dtype=bool)))
    assert torch.equal(batch.utterances.tokens, alone.tokens)
    assert torch.equal(batch.utterances.clips, alone.clips)
    assert torch.equal(batch.utterances.labels, alone.labels)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (2, 0), (4, 3)])
def test_ranks_and_workers_change_no_batch_of_dialogues(world_size: int, workers: int, uneven_corpus: Corpus) -> None:
    reader, plan = dialogues_of(uneven_corpus)
    ids, valid = planned_epoch(plan, EPOCH)
    accumulation = BATCH // world_size
    ranks = [
        list(stream(reader, plan.share(EPOCH, 0, world_size, rank, accumulation), workers))
        for rank in range(world_size)
    ]
    dealt: list[Sequence[DialogueBatch]] = list(zip_longest(*ranks))
    assert [int(batch.ids) for micro in dealt for batch in micro] == ids.ravel().tolist()
    assert [bool(batch.valid) for micro in dealt for batch in micro] == valid.ravel().tolist()
