"""Rare classes drawn more often: how often, and never beside themselves."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import run_ranks
from helpers import planned_epoch
from hypothesis import given
from hypothesis import strategies as st
from training_fixtures import FEAR, LABELS, SIZES, Trained, corpus, recipe, train

from jointfuse.data.columns import Weights
from jointfuse.data.plan import Plan
from jointfuse.data.shards import Corpus

__all__ = ["corpus", "recipe"]


def plan_of(weights: np.ndarray, batch: int, seed: int, block: int = 2**16) -> Plan:
    lengths = np.random.default_rng(seed).integers(1, 60, len(weights))
    shards = [17] * (len(weights) // 17) + [len(weights) % 17]
    return Plan(lengths, batch, seed, shards, block, weights)


weighted = st.builds(
    lambda size, seed: np.random.default_rng(seed).choice([0.05, 0.3, 1.0, 2.5, 6.0], size),
    st.integers(1, 400),
    st.integers(0, 2**30),
)


@given(weighted, st.integers(1, 40), st.integers(0, 2**30))
def test_each_utterance_is_drawn_as_often_as_its_weight_says_rounded_up_or_down(
    weights: np.ndarray, batch: int, seed: int
) -> None:
    ids, valid = planned_epoch(plan_of(weights, batch, seed), 3)
    drawn = np.bincount(ids[valid], minlength=len(weights))
    expected = weights * len(weights) / weights.sum()
    assert drawn.sum() == len(weights)
    assert (np.abs(drawn - expected) < 1).all()
    for weight in set(weights):
        group = weights == weight
        assert abs(drawn[group].sum() - expected[group].sum()) < 1 + 1e-6


@given(weighted, st.integers(1, 40), st.integers(0, 2**30), st.integers(1, 200))
def test_a_balanced_epoch_is_a_function_of_seed_and_epoch_from_any_batch_on(
    weights: np.ndarray, batch: int, seed: int, block: int
) -> None:
    plan = plan_of(weights, batch, seed, block)
    ids, valid = planned_epoch(plan, 2)
    start = plan.steps_per_epoch // 2
    for number, (rest, counts) in enumerate(plan.batches(2, start), start):
        np.testing.assert_array_equal(rest, ids[number])
        np.testing.assert_array_equal(counts, valid[number])
    assert valid.sum() == len(weights)


@pytest.mark.parametrize("seed", range(5))
def test_no_utterance_is_twice_in_a_batch_unless_it_must_be(seed: int) -> None:
    weights = np.where(np.arange(800) % 40 == 0, 6.0, 0.9)
    plan = plan_of(weights, 20, seed)
    ids, _ = planned_epoch(plan, 0)
    assert np.bincount(ids.ravel()).max() > 5
    assert [len(set(batch)) for batch in ids.tolist()] == [20] * 40
    assert (np.diff(plan.lengths[ids], axis=1) >= 0).all(), "rows go from short to long still"


def test_copies_beyond_the_batches_there_are_share_one() -> None:
    weights = np.array([100.0, 1, 1, 1, 1, 1, 1, 1])
    ids, _ = planned_epoch(plan_of(weights, 4, 0), 0)
    assert np.bincount(ids.ravel())[0] >= 7


def test_weights_are_those_of_the_classes(corpus: Path) -> None:
    split = Corpus.open(corpus).split("train")
    labels = np.asarray(split.index["label"])
    counts = np.bincount(labels, minlength=len(LABELS))
    everything = np.arange(len(split))
    alike, root = Weights(split, "class")[everything], Weights(split, "sqrt")[everything]
    for weights in (alike, root):
        assert weights.sum() == pytest.approx(len(split))
    sums = [[weights[labels == label].sum() for label in range(len(LABELS))] for weights in (alike, root)]
    np.testing.assert_allclose(sums[0], len(split) / len(LABELS))
    np.testing.assert_allclose(sums[1] / np.sqrt(counts), sums[1][0] / np.sqrt(counts[0]))


def balanced(recipe: Path, folder: Path) -> tuple[Trained, list[int]]:
    from jointfuse.train.loop import Trainer

    seen: list[int] = []
    batches = Trainer._batches

    def watched(self: Any) -> Any:
        for total, micro in batches(self):
            seen.extend(int(label) for batch in micro for label in batch.labels[batch.valid])
            yield total, micro

    Trainer._batches = watched  # type: ignore[method-assign]
    try:
        return train(recipe, folder / "balanced", "data.balance=class", "data.context=2", "train.steps=8"), seen
    finally:
        Trainer._batches = batches  # type: ignore[method-assign]


@pytest.mark.required
def test_training_sees_every_class_as_often(recipe: Path, tmp_path: Path) -> None:
    ranks = run_ranks(2, balanced, tmp_path / "ranks", recipe, tmp_path)
    drawn = np.bincount(np.concatenate([seen for _, seen in ranks]), minlength=len(LABELS))
    assert drawn.sum() == SIZES["train"]
    assert np.ptp(drawn) <= 2
    assert drawn[LABELS.index("fear")] > 3 * len(FEAR)
    assert np.isfinite(ranks[0][0].losses).all()
