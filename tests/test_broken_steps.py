"""Steps whose loss or gradient is not finite: skipped, counted, and the end of the run if they do not stop."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import run_ranks
from training_fixtures import Trained, corpus, largest_difference, outcome, recipe, stage_file, trainer

from jointfuse.config import load_config
from jointfuse.data.shards import Corpus
from jointfuse.errors import UserError
from jointfuse.train.engine import full_state

__all__ = ["corpus", "recipe"]

pytestmark = pytest.mark.required
SETTINGS = ("train.steps=7", "train.micro_batch=1")
POISONED = 3  # a step


def poisoned(made: Any, steps: range, rank: int) -> dict[int, dict[str, np.ndarray]]:
    """Train with a spectrogram of one micro-batch of one rank full of infinities in those steps; weights behind every
    step, on rank 0."""
    batches, step = made._batches, made._step
    weights = {}

    def with_poison() -> Any:
        for total, micro in batches():
            if made.position.step + 1 in steps and made.rank == rank:
                micro[1] = replace(micro[1], mel=torch.full_like(micro[1].mel, torch.inf))
            yield total, micro

    def watched(*arguments: Any) -> None:
        step(*arguments)
        weights[made.position.step] = {name: tensor.float().numpy() for name, tensor in full_state(made.engine).items()}

    made._batches, made._step = with_poison, watched
    made.train()
    return weights


def one_bad_step(recipe: Path, run: Path, *settings: str) -> tuple[Trained, dict[int, dict[str, np.ndarray]]]:
    with trainer(recipe, run, *SETTINGS, *settings) as made:
        weights = poisoned(made, range(POISONED, POISONED + 1), rank=1)
        return outcome(made), weights


def every_stage(recipe: Path, folder: Path) -> dict[str, Any]:
    files = {f"stage {stage}": str(stage_file(stage, folder)) for stage in range(4)}
    files |= {"zero0_bf16": "zero0_bf16", "zero2_bf16": "zero2_bf16"}
    done: dict[str, Any] = {
        name: one_bad_step(recipe, folder / name, f"train.deepspeed={file}") for name, file in files.items()
    }
    queue = ("loss.pool=queue", "loss.queue=16")
    done["queue"] = one_bad_step(recipe, folder / "queue", *queue)
    with trainer(recipe, folder / "endless", *SETTINGS, "train.most_broken=2") as made:
        try:
            poisoned(made, range(2, 100), rank=0)
        except UserError as error:
            done["endless"] = str(error)
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("broken")


@pytest.fixture(scope="module")
def done(recipe: Path, folder: Path) -> dict[str, Any]:
    for_rank_0: dict[str, Any] = run_ranks(2, every_stage, folder / "ranks", recipe, folder, limit=500)[0]
    return for_rank_0


@pytest.mark.parametrize("name", [*(f"stage {stage}" for stage in range(4)), "zero0_bf16", "zero2_bf16", "queue"])
def test_a_step_that_is_not_finite_changes_nothing_and_the_run_goes_on(name: str, done: dict[str, Any]) -> None:
    trained, weights = done[name]
    assert largest_difference(weights[POISONED], weights[POISONED - 1]) == 0
    assert largest_difference(weights[POISONED + 1], weights[POISONED]) > 0
    rows = [row for row in trained.rows if row["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, 8))
    assert [row["broken"] for row in rows] == [0, 0, 1, 0, 0, 0, 0]
    assert [row["loss"] is None for row in rows] == [False, False, True, False, False, False, False]
    assert np.isfinite([row["loss"] for row in rows if row["loss"] is not None]).all()


def test_the_utterances_of_such_a_step_are_named_by_every_rank(
    done: dict[str, Any], folder: Path, recipe: Path
) -> None:
    noted = [json.loads(line) for line in (folder / "stage 1" / "broken.jsonl").read_text().splitlines()]
    assert {(row["step"], row["rank"]) for row in noted} == {(POISONED, 0), (POISONED, 1)}
    assert len(noted) == 6
    split = Corpus.open(load_config(str(recipe)).data.corpus).split("train")
    assert all(row["key"] == split.key(row["id"]) for row in noted)
    assert {row["loss"] for row in noted if row["rank"] == 1} == {"nan"}


def test_steps_in_a_row_end_the_run_with_one_line(done: dict[str, Any], folder: Path) -> None:
    assert done["endless"].startswith(
        "step 4: the loss or its gradient was not finite in 3 steps in a row, more than train.most_broken; "
        f"{folder / 'endless' / 'broken.jsonl'} names their utterances; lower train.lr"
    )
    assert "\n" not in done["endless"]
