from pathlib import Path

import numpy as np
import pytest
from distributed import run_ranks
from helpers import planned_epoch, reader_of
from training_fixtures import (
    Trained,
    corpus,
    largest_difference,
    make_corpus,
    moved,
    recipe,
    stage_file,
    train,
)

from jointfuse.data.plan import Plan, micro_batches
from jointfuse.data.shards import Corpus

__all__ = ["corpus", "recipe"]

pytestmark = pytest.mark.required
# float32, a loss near 1: the order of sums is all that differs, and Adam divides small gradients by their own size
# (weights measured to differ by 6.2e-5 after 7 steps on two ranks; a step moves a weight by up to 1e-3).
LOSS_TOLERANCE = 5e-5
WEIGHT_TOLERANCE = 2e-4
WORLD_SIZES = (1, 3, 2)
Runs = dict[tuple[str, int], Trained]


def every_division(recipe: Path, gapped: Path, stage3: Path, folder: Path) -> dict[str, Trained]:
    """What this world size can do of: a batch whole and in four parts, the contrastive loss, missing modalities."""
    import torch.distributed as dist

    ranks = dist.get_world_size()
    runs: dict[str, Trained] = {}
    if ranks < 3:
        # An epoch has 6 steps of 8; the last holds 3 utterances and 5 fillers.
        settings = ("loss.icl_weight=0", "train.batch=8", "train.steps=7", "model.joint_vectors=2")
        for name, micro in (("whole", 8 // ranks), ("four parts", 2 // ranks)):
            runs[name] = train(recipe, folder / f"{name} {ranks}", *settings, f"train.micro_batch={micro}")
    # An epoch has 8 steps of 6; the last holds 1 utterance and 5 fillers.
    runs["contrast"] = train(recipe, folder / f"contrast {ranks}", "train.batch=6", "train.steps=9")
    # An epoch is one step of 48, 43 utterances and 5 fillers.
    runs["small"] = train(recipe, folder / f"small {ranks}", "train.batch=48", "train.steps=3")
    settings = (f"data.corpus={gapped}", "data.missing_modality=allow", "train.batch=6", "train.steps=3")
    file = stage3 if ranks > 1 else "zero1"
    runs["gaps"] = train(recipe, folder / f"gaps {ranks}", f"train.deepspeed={file}", *settings)
    return runs


@pytest.fixture(scope="module")
def gapped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("gapped"), gaps=True)


@pytest.fixture(scope="module")
def runs(recipe: Path, gapped: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("accumulation")
    stage3 = stage_file(3, folder)
    found: Runs = {}
    for ranks in WORLD_SIZES:
        first = run_ranks(ranks, every_division, folder / f"ranks{ranks}", recipe, gapped, stage3, folder)[0]
        found |= {(name, ranks): trained for name, trained in first.items()}
    return found


def same(one: Trained, other: Trained) -> None:
    assert np.abs(one.losses - other.losses).max() < LOSS_TOLERANCE
    assert np.allclose(one.norms, other.norms, rtol=1e-4)
    assert largest_difference(moved(one.weights), moved(other.weights)) < WEIGHT_TOLERANCE


def plan_of(corpus: Path, batch: int) -> Plan:
    reader = reader_of(Corpus.open(corpus), "both", missing_modality="allow")
    return Plan(reader.positions((16, 16)), batch, seed=0)


def test_the_divisions_are_uneven(corpus: Path, gapped: Path) -> None:
    ids, valid = planned_epoch(plan_of(corpus, 6), 0)
    assert valid[-1].sum() == 1
    for ranks in (2, 3):
        holds = [micro_batches(valid[-1], ranks, rank, 1).sum() for rank in range(ranks)]
        assert sorted(holds) == [0] * (ranks - 1) + [1], "all ranks but one hold fillers only"
    parts = [micro_batches(planned_epoch(plan_of(corpus, 8), 0)[1][-1], 2, rank, 4).sum(axis=1) for rank in range(2)]
    assert min(part.min() for part in parts) == 0, "a micro-step without a real utterance"
    assert not np.array_equal(*parts)
    ids, _ = planned_epoch(plan_of(gapped, 6), 0)
    no_clip = np.asarray(Corpus.open(gapped).split("train").index["duration_ms"]) == 0
    alone = [no_clip[micro_batches(row, 3, rank, 1)].all() for row in ids[:3] for rank in range(3)]
    assert any(alone), "a rank without a single clip in its batch"
    assert not all(alone)


@pytest.mark.parametrize("ranks", [1, 2])
def test_four_accumulated_parts_of_a_batch_are_the_whole_batch(runs: Runs, ranks: int) -> None:
    whole, parts = runs["whole", ranks], runs["four parts", ranks]
    assert whole.losses.shape == (7, 3)
    same(parts, whole)
    same(runs["whole", 1], whole)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_together_see_one_pool_and_have_the_losses_of_one(runs: Runs, ranks: int) -> None:
    one, several = runs["contrast", 1], runs["contrast", ranks]
    assert (one.losses[:7, 2] > 0).all()
    assert one.losses[7, 2] == 0, "an utterance alone in the pool has no partner"
    same(several, one)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_corpus_smaller_than_a_batch_is_trained_on_by_any_number_of_ranks(runs: Runs, ranks: int) -> None:
    one, several = runs["small", 1], runs["small", ranks]
    assert one.losses.shape == (3, 3)
    assert one.position["epoch"] == 3
    same(several, one)


@pytest.mark.parametrize("ranks", [2, 3])
def test_missing_modalities_hang_no_rank_and_change_no_number_under_zero_3(runs: Runs, ranks: int) -> None:
    one, several = runs["gaps", 1], runs["gaps", ranks]
    same(several, one)
