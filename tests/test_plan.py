"""The training order: every promise of it as a property of numbers."""

import csv
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import soundfile
from helpers import planned_epoch
from hypothesis import given
from hypothesis import strategies as st

from jointfuse.config import DataSettings
from jointfuse.data.plan import Plan, evaluation_batches, micro_batches, padding
from jointfuse.errors import UserError


def lengths_of(size: int, seed: int) -> np.ndarray:
    """Milliseconds as an index has them: uint32, some alike."""
    return np.random.default_rng(seed).integers(1, 40, size).astype(np.uint32) * 100


def plan_of(shards: list[int], batch: int, seed: int, block: int) -> Plan:
    return Plan(lengths_of(sum(shards), seed), batch, seed, shards, block)


plans = st.builds(
    plan_of,
    st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(any),
    st.integers(1, 40),
    st.integers(0, 2**40),
    st.integers(1, 500),
)
epochs = st.integers(0, 1000)


@given(plans, epochs)
def test_every_utterance_counts_exactly_once_an_epoch(plan: Plan, epoch: int) -> None:
    ids, valid = planned_epoch(plan, epoch)
    assert ids.shape == valid.shape == (plan.steps_per_epoch, plan.batch)
    assert ids.dtype == np.int64
    assert sorted(ids[valid]) == list(range(len(plan.lengths)))
    assert valid.sum(axis=1).tolist() == [plan.counted(number) for number in range(plan.steps_per_epoch)]


@given(plans, epochs)
def test_only_the_last_batch_is_filled_and_with_utterances_that_exist(plan: Plan, epoch: int) -> None:
    ids, valid = planned_epoch(plan, epoch)
    assert valid[:-1].all()
    assert valid[-1].sum() == (len(plan.lengths) - 1) % plan.batch + 1
    assert 0 <= ids.min() <= ids.max() < len(plan.lengths)


@given(plans, epochs)
def test_an_epoch_is_a_function_of_seed_and_epoch_alone(plan: Plan, epoch: int) -> None:
    again = replace(plan)
    planned_epoch(again, epoch + 1)  # what was asked before must not matter
    for one, other in zip(planned_epoch(plan, epoch), planned_epoch(again, epoch), strict=True):
        np.testing.assert_array_equal(one, other)


@given(plans, epochs, st.data())
def test_an_epoch_goes_on_from_any_batch_as_it_would_have(plan: Plan, epoch: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, plan.steps_per_epoch))
    rest = list(plan.batches(epoch, start))
    assert len(rest) == plan.steps_per_epoch - start
    for found, *expected in zip(rest, *(part[start:] for part in planned_epoch(plan, epoch)), strict=True):
        np.testing.assert_array_equal(found, expected)


class Asked:
    """Lengths that remember which of them were asked for."""

    def __init__(self, size: int) -> None:
        self.size, self.ids = size, set[int]()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, ids: np.ndarray) -> np.ndarray:
        self.ids |= set(ids.tolist())
        return ids % 7


def test_one_batch_asks_for_the_lengths_of_one_block_or_two() -> None:
    asked = Asked(20_000)
    plan = Plan(asked, 30, seed=0, shards=[40] * 500, block=400)
    assert plan.window >= 8, "asked of the first block, once"
    for epoch, start in ((0, 0), (3, 17), (5, 600)):
        asked.ids.clear()
        next(plan.batches(epoch, start))
        assert len(asked.ids) <= 2 * 400


def test_shards_come_in_another_order_every_epoch_and_mix_within_blocks_only() -> None:
    plan = Plan(np.ones(6000), 10, seed=0, shards=[100] * 60, block=1000)
    orders = []
    for epoch in range(2):
        shards = planned_epoch(plan, epoch)[0].reshape(6, -1) // 100
        assert [len(set(block)) for block in shards.tolist()] == [10] * 6
        orders.append([sorted(set(block)) for block in shards.tolist()])
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])


def test_epochs_and_seeds_differ_from_each_other() -> None:
    orders = {
        (seed, epoch): tuple(planned_epoch(Plan(lengths_of(100, 0), 8, seed), epoch)[0].ravel())
        for seed, epoch in product(range(12), range(12))
    }
    assert len(set(orders.values())) == len(orders)


def test_batches_come_in_random_order_and_not_by_length() -> None:
    plan = Plan(np.arange(4096), 8, seed=0)
    ids, _ = planned_epoch(plan, 0)
    longer = np.diff(plan.lengths[ids].mean(axis=1)) > 0
    assert 0.4 < longer.mean() < 0.6, "a batch is followed by a longer one as often as by a shorter one"


def test_the_rows_of_a_batch_go_from_short_to_long() -> None:
    plan = Plan(lengths_of(3000, 1), 30, seed=0)
    ids, _ = planned_epoch(plan, 5)
    assert (np.diff(plan.lengths[ids].astype(np.int64), axis=1) >= 0).all()


def seconds_of(name: str, shared: Path) -> np.ndarray:
    """(S,) real durations: MELD's training utterances as its table times them, RAVDESS's clips as they are."""
    if name == "RAVDESS":
        return np.array(
            [soundfile.info(clip).duration for clip in sorted((shared / "data" / "ravdess").glob("*.flac"))]
        )
    with next((shared / "data" / "meld").glob("*train*.csv")).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    began, ended = (np.array([seconds(row[column]) for row in rows]) for column in ("StartTime", "EndTime"))
    return np.clip(ended - began, 0.1, DataSettings().max_seconds)


def seconds(time: str) -> float:
    hours, minutes, rest = time.replace(",", ".").split(":")
    return 3600 * int(hours) + 60 * int(minutes) + float(rest)


@pytest.mark.required
@pytest.mark.parametrize("batch", [16, 32, 64])
@pytest.mark.parametrize("name", ["MELD", "RAVDESS"])
def test_padding_takes_at_most_five_percent_of_the_patches_of_real_clips(name: str, batch: int, shared: Path) -> None:
    patches = -(-np.floor(1 + 100 * seconds_of(name, shared)) // 16)
    for epoch in range(3):
        ids, valid = planned_epoch(Plan(patches, batch, seed=0), epoch)
        whole = ids[valid.all(axis=1)]
        assert padding(patches, whole) < 0.055, "judged by one epoch, held in others"
    unsorted = np.random.default_rng(0).permutation(len(patches))[: whole.size].reshape(whole.shape)
    assert padding(patches, unsorted) > 4 * padding(patches, whole)


def test_the_window_is_the_narrowest_that_wastes_little() -> None:
    assert Plan(np.full(1000, 7), 10, seed=0).window == 8, "nothing is wasted however they are mixed"
    windows = [Plan(lengths_of(4000, 1) // step, 10, seed=0).window for step in (1, 400, 1000)]
    assert windows == sorted(windows, reverse=True)
    for seed in range(3):
        plan = Plan(lengths_of(4000, seed), 10, seed)
        batches = planned_epoch(plan, 0)[0]
        assert padding(plan.lengths, batches) <= 0.05
    assert Plan(np.array([1, 3]), 2, seed=0).window == 8


def test_padding_is_the_share_of_positions_behind_the_end_of_an_utterance() -> None:
    lengths = np.array([4, 1, 2, 2, 0, 0])
    assert padding(lengths, np.array([[0, 1], [2, 3]])) == pytest.approx(3 / 12)
    assert padding(lengths, np.array([[4, 5]])) == 0
    assert padding(lengths, np.empty((0, 2), dtype=np.int64)) == 0


def test_batches_stay_mixed_over_epochs_although_lengths_are_sorted() -> None:
    lengths = lengths_of(2000, 2)
    plan = Plan(lengths, 20, seed=0)
    partners = [set(batch) - {7} for epoch in range(10) for batch in planned_epoch(plan, epoch)[0] if 7 in batch]
    met = len(set.union(*partners))
    assert met > 3 * 19, "of at most 190; were lengths alone to decide it would be 19"


def test_no_utterances_is_one_clear_error() -> None:
    with pytest.raises(UserError, match="training split is empty"):
        planned_epoch(Plan(np.array([], dtype=np.uint32), 8, 0), 0)


# ---------------------------------------------------------------------------------------------------- over ranks


@st.composite
def divisions(draw: st.DrawFn) -> tuple[np.ndarray, int, int]:
    """(rows of a global batch sorted by length, ranks, accumulation steps)"""
    world_size, accumulation, micro = draw(st.integers(1, 6)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    return np.arange(world_size * accumulation * micro), world_size, accumulation


@given(divisions())
def test_micro_batches_part_a_global_batch_exactly(division: tuple[np.ndarray, int, int]) -> None:
    batch, world_size, accumulation = division
    held = [micro_batches(batch, world_size, rank, accumulation) for rank in range(world_size)]
    assert {part.shape for part in held} == {(accumulation, len(batch) // world_size // accumulation)}
    assert sorted(np.concatenate([part.ravel() for part in held])) == list(batch)


@given(divisions())
def test_ranks_hold_equal_loads_in_every_micro_step(division: tuple[np.ndarray, int, int]) -> None:
    batch, world_size, accumulation = division
    held = np.stack([micro_batches(batch, world_size, rank, accumulation) for rank in range(world_size)])
    # Rows are sorted by length: the n-th of any rank is within a rank count of the n-th of any other.
    assert (np.ptp(held, axis=0) < world_size).all()


@given(divisions())
def test_validity_is_dealt_as_ids_are(division: tuple[np.ndarray, int, int]) -> None:
    batch, world_size, accumulation = division
    pairs = np.stack([batch, batch % 3], axis=1)
    for rank in range(world_size):
        dealt = micro_batches(pairs, world_size, rank, accumulation)
        np.testing.assert_array_equal(dealt[..., 0] % 3, dealt[..., 1])
        np.testing.assert_array_equal(dealt[..., 0], micro_batches(batch, world_size, rank, accumulation))


@given(st.integers(1, 200), st.integers(0, 99))
def test_global_batches_are_the_same_for_every_division(size: int, seed: int) -> None:
    plan = Plan(lengths_of(size, seed), 12, seed)
    ids, valid = planned_epoch(plan, seed)
    for world_size, accumulation in ((1, 1), (2, 3), (3, 1), (12, 1), (1, 12), (4, 3)):
        for batch, counts in zip(ids, valid, strict=True):
            held = [
                (int(id), bool(counted))
                for rank in range(world_size)
                for id, counted in zip(
                    micro_batches(batch, world_size, rank, accumulation).ravel(),
                    micro_batches(counts, world_size, rank, accumulation).ravel(),
                    strict=True,
                )
            ]
            assert sorted(held) == sorted(zip(batch.tolist(), counts.tolist(), strict=True))


# ---------------------------------------------------------------------------------------------------- evaluation


@given(st.integers(0, 120), st.integers(1, 20), st.integers(1, 7))
def test_evaluation_reads_every_utterance_once_over_all_ranks(size: int, batch: int, world_size: int) -> None:
    lengths = lengths_of(size, size)
    ranks = [list(evaluation_batches(lengths, batch, world_size, rank)) for rank in range(world_size)]
    assert len({len(rank) for rank in ranks}) == 1, "sharded parameters are gathered by all ranks together"
    seen = [id for rank in ranks for ids, valid in rank for id in ids[valid]]
    assert sorted(seen) == list(range(size))
    assert all(0 < len(ids) <= batch for rank in ranks for ids, _ in rank)


@given(st.integers(1, 120), st.integers(1, 20), st.integers(2, 7))
def test_evaluation_batches_do_not_depend_on_the_number_of_ranks(size: int, batch: int, world_size: int) -> None:
    lengths = lengths_of(size, size)
    alone = [ids.tolist() for ids, _ in evaluation_batches(lengths, batch, 1, 0)]
    ranks = [list(evaluation_batches(lengths, batch, world_size, rank)) for rank in range(world_size)]
    together = [ids.tolist() for step in zip(*ranks, strict=True) for ids, valid in step if valid.any()]
    assert together == alone
    assert all(valid.all() or not valid.any() for rank in ranks for _, valid in rank)
    longest = [lengths[ids].max() for ids in alone]
    assert longest == sorted(longest, reverse=True), "the batch that needs most memory comes first"
