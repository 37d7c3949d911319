import shutil
from pathlib import Path

import numpy as np
import pytest
from distributed import run_ranks
from training_fixtures import (
    DROPOUT,
    Trained,
    corpus,
    largest_difference,
    moved,
    recipe,
    stage_file,
    train,
)

__all__ = ["corpus", "recipe"]

pytestmark = pytest.mark.required
STAGES = (0, 1, 2, 3)
RECOMPUTED = ("block", "attention", "layer")
STOP = 9  # of 20 steps; an epoch has 8
# Two ranks, float32, dropout on (the same draws at every stage), 20 steps of a loss near 1: sums in another order are
# all that may differ.
LOSS_TOLERANCE = 1e-5
WEIGHT_TOLERANCE = 1e-5
Runs = dict[tuple[str, int], Trained]


def every_stage(recipe: Path, files: dict[int, Path], folder: Path) -> Runs:
    """On each of two ranks: every stage straight through and resumed; with layers recomputed."""
    import torch.distributed as dist

    runs: Runs = {}
    for stage, file in files.items():
        settings = (
            f"train.deepspeed={file}",
            "train.evaluate_every=7 steps",
            f"train.save_every={STOP} steps",
            "train.keep_checkpoints=3",
            *DROPOUT,
        )
        run, again = folder / f"straight{stage}", folder / f"again{stage}"
        runs["straight", stage] = train(recipe, run, *settings)
        if dist.get_rank() == 0:
            # As a run that was killed after step 14: its log is ahead of its newest checkpoint.
            shutil.copytree(run, again)
            for checkpoint in sorted((again / "checkpoints").glob("step-*"))[1:]:
                shutil.rmtree(checkpoint)
            (again / "checkpoints" / "latest").write_text(f"step-{STOP:08d}\n", encoding="utf-8")
            lines = (again / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
            (again / "metrics.jsonl").write_text("".join(lines[:14]) + lines[14][:20], encoding="utf-8")
        dist.barrier()
        runs["resumed", stage] = train(recipe, again, *settings, resume=True)
        if stage == 3:
            for mode in RECOMPUTED:
                recomputed = (*settings, f"train.checkpointing={mode}")
                runs[f"recomputed {mode}", stage] = train(recipe, folder / mode, *recomputed, stop_after=4)
    return runs


@pytest.fixture(scope="module")
def runs(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("zero")
    files = {stage: stage_file(stage, folder) for stage in STAGES}
    result: Runs = run_ranks(2, every_stage, folder / "ranks", recipe, files, folder, limit=500)[0]
    return result


def test_the_loss_falls(runs: Runs) -> None:
    losses = runs["straight", 0].losses
    assert losses.shape == (20, 3)
    assert losses[-8:, 1].mean() < 0.7 * losses[:8, 1].mean()
    assert (losses[[0, 1, 2], 2] > 0).all(), "the contrastive loss takes part"
    assert losses[7, 2] == losses[15, 2] == 0, "one utterance has no partner"


@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_sharded_run_has_the_losses_weights_and_scores_of_an_unsharded_one(runs: Runs, stage: int) -> None:
    plain, sharded = runs["straight", 0], runs["straight", stage]
    assert np.abs(sharded.losses - plain.losses).max() < LOSS_TOLERANCE
    assert np.allclose(sharded.norms, runs["straight", 1].norms, rtol=1e-4)
    assert largest_difference(moved(sharded.weights), moved(plain.weights)) < WEIGHT_TOLERANCE
    assert [row["step"] for row in plain.dev] == [7, 14, 20]
    assert sharded.dev == plain.dev


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_resumed_in_mid_epoch_is_the_run_that_was_never_stopped(runs: Runs, stage: int) -> None:
    straight, resumed = runs["straight", stage], runs["resumed", stage]
    assert np.array_equal(resumed.losses, straight.losses)
    assert largest_difference(resumed.weights, straight.weights) == 0
    assert resumed.dev == straight.dev
    assert resumed.position == straight.position


@pytest.mark.parametrize("mode", RECOMPUTED)
def test_recomputing_layers_whose_parameters_are_sharded_changes_no_loss(runs: Runs, mode: str) -> None:
    recomputed = runs[f"recomputed {mode}", 3].losses
    assert np.abs(recomputed - runs["straight", 3].losses[:4]).max() < LOSS_TOLERANCE
