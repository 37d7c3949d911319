"""The pools of the contrastive loss: a whole step, a micro-batch of every rank, past features."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contrast_reference import contrast_by_hand
from distributed import run_ranks
from helpers import gradients, make_batch, make_network, model_settings
from training_fixtures import (
    DROPOUT,
    Trained,
    corpus,
    largest_difference,
    moved,
    outcome,
    recipe,
    stage_file,
    train,
    trainer,
)

from jointfuse.config import LossSettings
from jointfuse.losses import classification_loss
from jointfuse.train.objective import Objective
from jointfuse.train.pool import pool_step

__all__ = ["corpus", "recipe"]

pytestmark = pytest.mark.required
# float32, a loss near 1, as in test_accumulation.py: the order of sums is all that differs.
LOSS_TOLERANCE = 5e-5
WEIGHT_TOLERANCE = 5e-5
STAGES = (0, 1, 2, 3)
Runs = dict[Any, Trained]


@pytest.mark.parametrize("train_temperature", [False, True])
def test_two_passes_have_the_gradient_of_one_graph_over_all_micro_batches(train_temperature: bool) -> None:
    dropout = {f"{part}__dropout": 0.3 for part in ("text_encoder", "extractor", "language", "vision")}
    network = make_network(model_settings(**dropout)).train()
    settings = LossSettings(train_temperature=train_temperature, temperature=0.3, icl_weight=0.7)
    batches = [
        make_batch(tokens=[7, 2, 1], frames=[120, 16, 33], labels=[0, 1, 0], valid=[True, True, False]),
        make_batch(tokens=[3], frames=[50], labels=[1], valid=[True]),
        make_batch(tokens=[4, 9], frames=[90, 200], labels=[0, 2], valid=[True, True]),
    ]
    objective = Objective(network, settings, accumulation=3)
    assert objective.pools_beforehand
    pooled = pool_step(objective, batches, 5, torch.manual_seed)
    erc = torch.zeros(())
    for number, batch in enumerate(batches):
        torch.manual_seed(number)
        losses = objective(batch, 5, *pooled.gradients(number))
        (losses["loss"] / 3).backward()  # as DeepSpeed divides it
        erc += losses["erc"] / 3
    found = gradients(objective)
    objective.zero_grad()

    expected_erc, features = torch.zeros(()), []
    for number, batch in enumerate(batches):
        torch.manual_seed(number)
        logits, rows = network(batch)
        expected_erc = expected_erc + classification_loss(logits, batch.labels, batch.valid, 1, 5)
        features.append(rows[batch.valid])
    labels = torch.cat([batch.labels[batch.valid] for batch in batches])
    assert objective.contrast is not None
    icl = contrast_by_hand(torch.cat(features), labels, objective.contrast.tau(), True)
    (expected_erc + 0.7 * icl).backward()
    torch.testing.assert_close(erc, expected_erc.detach())
    torch.testing.assert_close(pooled.icl, icl.detach())
    expected = gradients(objective)
    assert found.keys() == expected.keys()
    assert ("contrast.temperature.logarithm" in found) == train_temperature
    for name, gradient in expected.items():
        slack = 1e-5 * max(1e-2, float(gradient.abs().max()))
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-4, atol=slack, msg=lambda text, n=name: f"{n}: {text}"
        )


# ------------------------------------------------------------------------------------------------------- several ranks


def every_pool(recipe: Path, files: dict[int, Path], folder: Path) -> Runs:
    """On each rank. An epoch has 6 steps of 8, the last with 3 utterances and 5 fillers."""
    import torch.distributed as dist

    ranks = dist.get_world_size()
    runs: Runs = {}
    for stage, file in files.items():
        settings = (f"train.deepspeed={file}", "train.batch=8", "train.steps=7")
        for name, micro, *more in (
            ("whole", 8 // ranks),
            ("step", 2 // ranks),
            ("micro", 2 // ranks, "loss.pool=micro"),
        ):
            where = folder / f"{name} {stage} {ranks}"
            runs[name, stage] = train(recipe, where, *settings, f"train.micro_batch={micro}", *more)
    settings = ("train.batch=8", f"train.micro_batch={4 // ranks}", "train.steps=7", "train.save_every=3 steps")
    settings = (*settings, "loss.pool=queue", "loss.queue=10", *DROPOUT)
    for stage in (2, 3) if ranks == 2 else ():
        where = folder / f"queue {stage} {ranks}"
        file = f"train.deepspeed={files[stage]}"
        runs["queue", stage] = train(recipe, where, *settings, file)
        train(recipe, folder / f"dead {stage} {ranks}", *settings, file, stop_after=4)
        runs["queue resumed", stage] = train(recipe, folder / f"dead {stage} {ranks}", *settings, file, resume=True)
    return runs


def first_gradient(recipe: str, run: Path, *settings: str) -> tuple[Trained, dict[str, np.ndarray]]:
    """A short run, and the gradient of every parameter in its first step."""
    from deepspeed.utils import safe_get_full_grad

    found: dict[str, np.ndarray] = {}
    with trainer(Path(recipe), run, *settings) as made:
        step = made.engine.step

        def keep_and_step() -> None:
            if made.position.step == 1 and made.engine.is_gradient_accumulation_boundary():
                for name, parameter in made.engine.module.named_parameters():
                    found[name] = safe_get_full_grad(parameter).float().numpy().copy()
            step()

        made.engine.step = keep_and_step
        made.train()
        return outcome(made), found


def demo_in_eight_parts(corpus: Path, files: dict[int, Path], folder: Path) -> dict[Any, Any]:
    """The demo recipe on each of two ranks: a micro-batch of 8, and 8 of one utterance."""
    settings = (f"data.corpus={corpus}", "data.max_seconds=1.5", "train.batch=16", "train.epochs=null")
    still = ("model.text_encoder.dropout=0", "model.language.dropout=0", "model.extractor.dropout=0", "train.steps=1")
    runs: dict[Any, Any] = {}
    for stage, file in files.items():
        for name, micro in (("whole", 8), ("parts", 1)):
            more = (*settings, f"train.deepspeed={file}", f"train.micro_batch={micro}")
            where = folder / f"demo {name} {stage}"
            runs[name, stage] = first_gradient("demo", where, *more, *still)[1]
    runs["trained"] = train(Path("demo"), folder / "demo", *more, "train.steps=12", "train.log_every=1")
    return runs


@pytest.mark.parametrize("stage", [2, 3])
def test_the_demo_recipe_has_in_eight_parts_the_gradient_of_one(demo: dict[Any, Any], stage: int) -> None:
    whole, parts = demo["whole", stage], demo["parts", stage]
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        np.testing.assert_allclose(parts[name], gradient, atol=1e-4 * np.abs(gradient).max() + 1e-6, err_msg=name)


def test_the_demo_recipe_learns_in_eight_parts(demo: dict[Any, Any]) -> None:
    losses = demo["trained"].losses[:, 0]
    assert np.isfinite(losses).all()
    assert losses[-4:].mean() < losses[:4].mean()


@pytest.fixture(scope="module")
def demo(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    folder = tmp_path_factory.mktemp("demo")
    files = {stage: stage_file(stage, folder) for stage in (3, 2)}
    return run_ranks(2, demo_in_eight_parts, folder / "ranks", corpus, files, folder)[0]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def runs(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Runs]:
    folder = tmp_path_factory.mktemp("pools")
    files = {stage: stage_file(stage, folder) for stage in STAGES}
    one = run_ranks(1, every_pool, folder / "one", recipe, {2: files[2]}, folder)[0]
    two = run_ranks(2, every_pool, folder / "two", recipe, files, folder, limit=500)
    return {1: one, 2: two[0]}


def same(found: Trained, expected: Trained) -> None:
    assert np.abs(found.losses - expected.losses).max() < LOSS_TOLERANCE
    if np.isfinite(found.norms).all() and np.isfinite(expected.norms).all():  # stage 0 keeps none
        # One gradient of one model is compared in the first step; later ones are of models a little apart.
        assert np.isclose(found.norms[0], expected.norms[0], rtol=1e-5)
        assert np.allclose(found.norms, expected.norms, rtol=1e-3)
    assert largest_difference(moved(found.weights), moved(expected.weights)) < WEIGHT_TOLERANCE


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_in_four_parts_is_the_step_in_one(runs: dict[int, Runs], stage: int) -> None:
    assert (runs[1]["whole", 2].losses[:, 2] > 0).all()
    same(runs[2]["step", stage], runs[2]["whole", stage])
    same(runs[2]["step", stage], runs[1]["whole", 2])
    same(runs[1]["step", 2], runs[1]["whole", 2])


@pytest.mark.parametrize("stage", STAGES)
def test_a_pool_of_micro_batches_is_the_same_on_one_rank_and_on_two(runs: dict[int, Runs], stage: int) -> None:
    same(runs[2]["micro", stage], runs[1]["micro", 2])
    apart = np.abs(runs[1]["micro", 2].losses[:, 2] - runs[1]["step", 2].losses[:, 2]).max()
    assert apart > 0.05, "micro-batches are smaller pools than the step"


def rows(trained: Trained) -> list[dict[str, Any]]:
    return [row for row in trained.rows if row["kind"] == "train"]


def test_the_log_says_what_the_pools_were(runs: dict[int, Runs]) -> None:
    for row in rows(runs[2]["step", 2])[:5]:
        assert row["pool"] == 8
        assert 0 <= row["counted_anchors"] <= 8
        assert row["share_without_partner"] == pytest.approx(1 - row["counted_anchors"] / 8)
        assert -1 <= row["negative_similarity"] <= 1
    assert {row["pool"] for row in rows(runs[2]["micro", 2])[:5]} == {2.0}
    assert rows(runs[2]["step", 2])[5]["pool"] == 3, "fillers are not in the pool"
    first, last = (
        np.mean([row["share_without_partner"] for row in rows(runs[2][name, 2])]) for name in ("micro", "step")
    )
    assert first > last, "in a small pool more anchors find no partner"


@pytest.mark.parametrize("stage", [2, 3])
def test_a_queue_goes_on_where_its_checkpoint_was_written(runs: dict[int, Runs], stage: int) -> None:
    straight, resumed = runs[2]["queue", stage], runs[2]["queue resumed", stage]
    assert np.array_equal(resumed.losses, straight.losses)
    assert largest_difference(resumed.weights, straight.weights) == 0
    pools = [row["pool"] for row in rows(straight)]
    # Two micro-batches of four a step: the first finds an empty queue, from the third step on it is full.
    assert pools[:5] == [(4 + 8) / 2, (12 + 14) / 2, 14, 14, 14]
