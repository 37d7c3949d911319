"""Batches made ahead: the same ones, in order, and nothing left running behind."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from helpers import reader_of

from jointfuse.data.feed import Feed, Waited, ahead
from jointfuse.data.shards import Corpus
from jointfuse.data.stream import stream
from jointfuse.errors import UserError


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("number", [0, 1, 2, 50])
def test_what_is_made_ahead_comes_in_the_same_order(number: int, depth: int) -> None:
    assert list(ahead(iter(range(number)), depth)) == list(range(number))


def test_no_more_than_asked_is_made_ahead() -> None:
    made: list[int] = []

    def noted() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    items = ahead(noted(), 2)
    for taken in range(20):
        assert next(items) == taken
        assert len(made) <= taken + 4, "those taken, two ready, one being made"
    items.close()  # type: ignore[attr-defined]


def test_what_cannot_be_made_is_raised_in_its_place() -> None:
    def failing() -> Iterator[int]:
        yield from (1, 2)
        raise UserError("the third is damaged")

    items = ahead(failing(), 2)
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(UserError, match="the third is damaged"):
        next(items)


def test_whoever_leaves_early_leaves_no_thread_behind() -> None:
    before = threading.active_count()
    for taken in range(4):
        items = ahead(iter(range(1000)), 2)
        for _ in range(taken):
            next(items)
        items.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_a_feed_hands_on_every_batch_and_counts_the_time_it_waited(uneven_corpus: Corpus) -> None:
    reader = reader_of(uneven_corpus, "both")
    planned = [(np.array(ids), np.array([True] * len(ids))) for ids in ([3, 1], [0], [2, 2, 5])]
    waited = Waited()
    batches = list(Feed(stream(reader, planned, 0), torch.device("cpu"), reader.front_end, waited))
    for batch, (ids, _) in zip(batches, planned, strict=True):
        assert batch.ids.tolist() == ids.tolist()
        expected = reader.batch((ids, np.array([True] * len(ids)))).to("cpu", reader.front_end)
        assert torch.equal(batch.mel, expected.mel)
    assert waited.seconds > 0
