"""The stream of an epoch in real ranks: the same global batches whoever reads them, killed or not."""

import json
import os
import signal
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import run_ranks
from helpers import build_corpus, planned_epoch, reader_of

from jointfuse.data.plan import Plan
from jointfuse.data.shards import Corpus
from jointfuse.data.stream import stream

pytestmark = pytest.mark.required
BATCH, EPOCH = 4, 3


def plan_of(corpus: Corpus) -> tuple[Any, Plan]:
    """Blocks of two shards or so."""
    reader = reader_of(corpus, "both")
    return reader, Plan(reader.positions((16, 16)), BATCH, seed=5, shards=reader.split.shard_sizes, block=8)


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return build_corpus(tmp_path_factory.mktemp("many") / "corpus", samples_per_shard=3, sizes={"train": 26, "dev": 7})


def read_on(corpus: Path, folder: Path, workers: int, die_in: int | None) -> None:
    """On each rank: from the batch that folder/position names to the end of the epoch, all ranks in step as training
    keeps them; ids and validity of every global batch go to folder/log, every third batch the position is written."""
    import torch.distributed as dist

    rank, world_size = dist.get_rank(), dist.get_world_size()
    accumulation = BATCH // world_size
    reader, plan = plan_of(Corpus.open(corpus))
    position = folder / "position"
    start = json.loads(position.read_text()) if position.exists() else 0
    log = folder / "log"
    if rank == 0 and log.exists():
        kept = log.read_text().splitlines(keepends=True)[:start]
        log.write_text("".join(kept))
    batches = stream(reader, plan.share(EPOCH, start, world_size, rank, accumulation), workers)
    for number in range(start, plan.steps_per_epoch):
        if number == die_in:
            dist.barrier()  # the first to die ends all of them, and the log is not written yet
            os.kill(os.getpid(), signal.SIGKILL)
        mine = [[batch.ids.tolist(), batch.valid.tolist()] for batch in islice(batches, accumulation)]
        held: list[Any] = [None] * world_size
        dist.all_gather_object(held, mine)
        if rank == 0:
            rows = np.array(held)  # (W, accumulation, 2, micro-batch)
            with log.open("a") as file:
                file.write(json.dumps(rows.transpose(2, 1, 3, 0).reshape(2, -1).tolist()) + "\n")
            if number % 3 == 2:
                position.write_text(json.dumps(number + 1))
    assert next(batches, None) is None


def expected(corpus: Path) -> list[list[list[int]]]:
    opened = Corpus.open(corpus)
    ids, valid = planned_epoch(plan_of(opened)[1], EPOCH)
    assert valid.sum() == len(opened.split("train")) < valid.size
    return [[list(row), list(map(int, counts))] for row, counts in zip(ids.tolist(), valid, strict=True)]


def log_of(folder: Path) -> list[list[list[int]]]:
    return [json.loads(line) for line in (folder / "log").read_text().splitlines()]


@pytest.mark.parametrize(("world_size", "shards"), [(1, 7), (2, 3), (4, 3), (4, 7)])
def test_ranks_and_workers_change_no_global_batch(
    world_size: int, shards: int, uneven_corpus: Corpus, many_shards: Corpus, tmp_path: Path
) -> None:
    corpus = uneven_corpus if shards == 3 else many_shards
    sizes = corpus.split("train").shard_sizes
    assert len(sizes) == shards
    assert len(set(sizes)) > 1
    path = corpus.path
    for workers in (0, 2, 3):
        folder = tmp_path / str(workers)
        folder.mkdir()
        run_ranks(world_size, read_on, folder / "ranks", path, folder, workers, None)
        assert log_of(folder) == expected(path), workers


@pytest.mark.parametrize(("before", "after"), [((2, 0), (4, 2)), ((4, 3), (1, 0))])
def test_killed_anywhere_an_epoch_goes_on_in_order_with_other_ranks_and_workers(
    before: tuple[int, int], after: tuple[int, int], uneven_corpus: Corpus, tmp_path: Path
) -> None:
    path = uneven_corpus.path
    die_in = int(np.random.default_rng(before).integers(1, 6))
    with pytest.raises(AssertionError, match="ended with status -9"):
        run_ranks(before[0], read_on, tmp_path / "before", path, tmp_path, before[1], die_in)
    assert log_of(tmp_path) == expected(path)[:die_in]
    run_ranks(after[0], read_on, tmp_path / "after", path, tmp_path, after[1], None)
    assert log_of(tmp_path) == expected(path)
