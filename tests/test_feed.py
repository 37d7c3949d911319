"""Batches made ahead: the same ones, in order, and nothing left running behind."""

import threading
from collections.abc import Iterator
from dataclasses import fields, replace

import numpy as np
import pytest
import simulated_gpu
import torch
from helpers import reader_of
from simulated_gpu import DEVICE, Gpu, OnGpu, OnHost

from jointfuse.data.batch import HostBatch
from jointfuse.data.feed import Feed, Waited, ahead, side_stream
from jointfuse.data.reader import UtteranceReader
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


# ---------------------------------------------------------------------------------------------- on a simulated GPU

PLANNED = [(np.array(ids), np.array([True] * len(ids))) for ids in [[3, 1], [0, 4], [2, 5]] * 6]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    gpu = Gpu()
    gpu.install(monkeypatch)
    side_stream.cache_clear()
    yield gpu
    side_stream.cache_clear()


@pytest.fixture(scope="module")
def reader(uneven_corpus: Corpus) -> UtteranceReader:
    return reader_of(uneven_corpus, "both")


def pinned(reader: UtteranceReader, gpu: Gpu) -> Iterator[HostBatch]:
    for host in stream(reader, PLANNED, 0):
        tensors = {field.name: getattr(host, field.name) for field in fields(host)}
        yield replace(host, **{k: OnHost.of(v, gpu) for k, v in tensors.items() if isinstance(v, torch.Tensor)})


def train_on_it(reader: UtteranceReader, gpu: Gpu) -> list[list[torch.Tensor]]:
    """Every tensor of every batch as it is read in the stream that trains."""
    read = []
    for batch in Feed(pinned(reader, gpu), DEVICE, reader.front_end):
        tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
        assert all(isinstance(tensor, OnGpu) for tensor in tensors), "nothing stays on the host"
        read.append([tensor.clone() for tensor in tensors])
    return read


def test_on_a_gpu_no_batch_is_read_before_it_is_there_or_overwritten_before_it_is_read(
    reader: UtteranceReader, gpu: Gpu
) -> None:
    read = train_on_it(reader, gpu)
    assert gpu.faults == []
    assert gpu.reused > len(PLANNED), "what the spectrograms are made of is used again"
    assert gpu.streams[0].clock[id(gpu.streams[0])] > len(PLANNED), "they are made in a stream beside"
    for tensors, planned in zip(read, PLANNED, strict=True):
        expected = vars(reader.batch(planned).to("cpu", reader.front_end)).values()
        for tensor, same in zip(tensors, (one for one in expected if isinstance(one, torch.Tensor)), strict=True):
            assert torch.equal(tensor.as_subclass(torch.Tensor), same)


@pytest.mark.parametrize(
    ("owner", "call", "fault"),
    [
        (simulated_gpu.Stream, "wait_event", "reads what may not have been written yet"),
        (simulated_gpu.Event, "record", "reads what may not have been written yet"),
        (simulated_gpu.OnGpu, "record_stream", "overwrites what may not have been read yet"),
    ],
)
def test_each_of_the_calls_that_keep_streams_apart_is_missed(
    owner: type, call: str, fault: str, reader: UtteranceReader, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, call, lambda *_: None)
    train_on_it(reader, gpu)
    assert any(fault in seen for seen in gpu.faults)


def test_epochs_and_evaluations_share_one_stream(reader: UtteranceReader, gpu: Gpu) -> None:
    training = iter(Feed(pinned(reader, gpu), DEVICE, reader.front_end))
    next(training)
    train_on_it(reader, gpu)  # an evaluation in the middle of an epoch
    assert len(list(training)) == len(PLANNED) - 1
    train_on_it(reader, gpu)
    assert len(gpu.streams) == 1
    assert gpu.faults == []
