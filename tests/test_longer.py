"""A run that is resumed for longer, or with settings that change no number."""

import json
from pathlib import Path

import numpy as np
import pytest
from distributed import run_ranks
from training_fixtures import Trained, corpus, largest_difference, recipe, train

from jointfuse.config import TrainSettings
from jointfuse.train.schedule import describe_longer, lr_factor

__all__ = ["corpus", "recipe"]

pytestmark = pytest.mark.required
CONSTANT = ("train.decay=constant", "train.warmup=0")
OTHERS = (
    "train.log_every=1",
    "train.record_batches=true",
    "train.evaluate_every=2 steps",
    "train.patience=99",
    "data.patience=1",
    "train.keep_checkpoints=3",
)


def forget_length(position: Path) -> None:
    """As checkpoints were that did not know for how long their run was to go on."""
    content = json.loads(position.read_text(encoding="utf-8"))
    assert (content.pop("steps"), content.pop("warmup")) == (5, 2)
    position.write_text(json.dumps(content), encoding="utf-8")


def lives(recipe: Path, folder: Path) -> dict[str, Trained]:
    """Runs of 9 steps, at once and in two or three lives."""
    runs = {"straight": train(recipe, folder / "straight", *CONSTANT, "train.steps=9")}
    train(recipe, folder / "longer", *CONSTANT, "train.steps=5")
    runs["longer"] = train(recipe, folder / "longer", *CONSTANT, *OTHERS, "train.steps=9", resume=True)
    linear = ("train.warmup=0.4", "train.save_every=1 step")
    train(recipe, folder / "linear", *linear, "train.steps=5")
    forget_length(folder / "linear" / "checkpoints" / "step-00000005" / "position.json")
    train(recipe, folder / "linear", *linear, "train.steps=9", resume=True, stop_after=7)
    runs["linear"] = train(recipe, folder / "linear", *linear, "train.steps=9", resume=True)
    return runs


@pytest.fixture(scope="module")
def lived(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Trained], str]:
    folder = tmp_path_factory.mktemp("longer")
    runs = run_ranks(1, lives, folder / "ranks", recipe, folder)[0]
    return runs, (folder / "ranks" / "rank0.log").read_text(encoding="utf-8")


def test_a_finished_run_goes_on_for_longer_as_one_that_was_to_be_so_long(
    lived: tuple[dict[str, Trained], str],
) -> None:
    straight, longer = lived[0]["straight"], lived[0]["longer"]
    assert longer.losses.shape == (9, 3)
    assert np.array_equal(longer.losses, straight.losses)
    assert largest_difference(longer.weights, straight.weights) == 0
    assert [row["step"] for row in longer.dev] == [5, 6, 8, 9], "evaluated as its second life was told to"
    assert "goes on to step 9 in place of 5: the learning rate stays as it is; its warm-up is over\n" in lived[1]


def test_the_learning_rate_falls_to_the_new_end_and_is_not_warmed_up_again_in_any_life(
    lived: tuple[dict[str, Trained], str],
) -> None:
    rates = [row["learning_rate"] for row in lived[0]["linear"].rows if row["kind"] == "train"]
    first = [1 / 2, 1, 1, 2 / 3, 1 / 3]  # of five steps, two of them a warm-up
    rest = [(9 - step) / 7 for step in range(5, 9)]
    assert rates == pytest.approx([1e-3 * factor for factor in first + rest])
    line = "the learning rate is 57% of train.lr from here, where it was 0%, and falls to 0 at the new end; its warm-up"
    assert lived[1].count(f"goes on to step 9 in place of 5: {line} is over\n") == 1, (
        "the third life goes on for no longer than the second"
    )


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_a_run_that_is_made_longer_in_its_warm_up_ends_that_first(decay: str) -> None:
    settings = TrainSettings.model_validate({"steps": 100, "warmup": 0.1, "decay": decay})
    assert [lr_factor(settings, step, 1000, warmup=10) for step in (4, 9, 10)] == [0.5, 1.0, 1.0]
    assert lr_factor(settings, 1000, 1000, warmup=10) == pytest.approx(0)
    assert describe_longer(settings, 4, 100, 1000, 10).endswith("; its warm-up stays as it was")
