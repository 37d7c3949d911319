from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import run_ranks
from training_fixtures import (
    DROPOUT,
    Stopped,
    Trained,
    corpus,
    die_after,
    largest_difference,
    outcome,
    recipe,
    scores,
    train,
    trainer,
)

__all__ = ["corpus", "recipe"]

pytestmark = pytest.mark.required
# bf16, dropout, varied clips, 3 micro-steps of 1 utterance a rank, decoding processes; float32: test_zero.py.
AUGMENT = "data.augment={speed: 0.1, noise: [10, 40], gain: 6, bin_masks: [2, 12], frame_masks: [2, 30]}"
SETTINGS = (*DROPOUT, AUGMENT, "train.micro_batch=1", "train.steps=7", "train.save_every=2 steps")
NAMES = ("zero0_bf16", "zero1_bf16")
Runs = dict[tuple[str, str], Trained]


def die_while_saving(recipe: Path, run: Path, step: int, *settings: str) -> list[str]:
    """A run that ends when DeepSpeed's files of the checkpoint at `step` are half there; names in its folder then."""
    import torch.distributed as dist

    with trainer(recipe, run, *settings) as made:
        save = made.engine.save_checkpoint

        def save_or_die(*arguments: Any, **options: Any) -> None:
            save(*arguments, **options)
            if made.position.step == step:
                raise Stopped

        made.engine.save_checkpoint = save_or_die
        with pytest.raises(Stopped):
            made.train()
        dist.barrier()
        return checkpoints(run)


def checkpoints(run: Path) -> list[str]:
    """Names in the folder, less the scripts that DeepSpeed adds."""
    return sorted(path.name for path in (run / "checkpoints").iterdir() if path.suffix != ".py")


def every_run(recipe: Path, folder: Path) -> tuple[Runs, dict[str, list[str]]]:
    runs: Runs = {}
    left: dict[str, list[str]] = {}
    for name in NAMES:
        plain = name == "zero0_bf16"
        settings = (f"train.deepspeed={name}", f"data.workers={int(plain)}", f"train.save_async={not plain}", *SETTINGS)
        runs["straight", name] = train(recipe, folder / name, *settings)
        left[name] = die_while_saving(recipe, folder / f"again-{name}", 6, *settings)
        runs["resumed", name] = train(recipe, folder / f"again-{name}", *settings, resume=True)
        if name == "zero0_bf16":
            early = folder / "before-the-first-checkpoint"
            train(recipe, early, *settings, stop_after=1)
            runs["resumed", "early"] = train(recipe, early, *settings, resume=True)
            runs["resumed", "finished"] = train(recipe, folder / name, *settings, resume=True)
            left["finished"] = checkpoints(folder / name)
    return runs, left


def patience_over_two_lives(recipe: Path, folder: Path) -> tuple[Trained, Trained, Trained]:
    """Dev scores are given; a run with patience 3, the same run that dies, and the first one resumed once more."""
    from jointfuse.train import loop

    real = loop.score
    given = {1: 0.2, 2: 0.5, 3: 0.4, 4: 0.5, 5: 0.3, 6: 0.9}
    settings = ("train.evaluate_every=1 step", "train.save_every=3 steps", "train.patience=3", "train.steps=7")

    def live(run: Path, resume: bool, stop_after: int | None) -> Trained:
        with trainer(recipe, run, *settings, resume=resume) as made:
            loop.score = lambda labels, predicted, names: scores(names, given[made.position.step])
            die_after(made, stop_after)
            try:
                made.train()
            except Stopped:
                pass
            finally:
                loop.score = real

            return outcome(made)

    straight = live(folder / "patience", False, None)
    live(folder / "patience-again", False, 4)
    resumed = live(folder / "patience-again", True, None)
    return straight, resumed, live(folder / "patience", True, None)


def both(recipe: Path, folder: Path) -> tuple[Any, Any]:
    return every_run(recipe, folder), patience_over_two_lives(recipe, folder)


@pytest.fixture(scope="module")
def spawned(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("resume")
    result: tuple[Any, Any] = run_ranks(2, both, folder / "ranks", recipe, folder, limit=500)[0]
    return result


@pytest.fixture(scope="module")
def runs(spawned: tuple[Any, Any]) -> Runs:
    return spawned[0][0]


@pytest.mark.parametrize("name", NAMES)
def test_with_dropout_and_accumulation_a_resumed_run_is_the_run_that_was_never_stopped(runs: Runs, name: str) -> None:
    straight, resumed = runs["straight", name], runs["resumed", name]
    assert len(straight.losses) == 7
    assert np.array_equal(resumed.losses, straight.losses)
    assert largest_difference(resumed.weights, straight.weights) == 0
    assert resumed.position == straight.position


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_dies_while_saving_leaves_its_last_whole_checkpoint_in_charge(
    spawned: tuple[Any, Any], name: str
) -> None:
    left = spawned[0][1][name]
    assert left == [".step-00000006.partial", "latest", "step-00000002", "step-00000004"]


def test_a_run_that_died_before_its_first_checkpoint_starts_again(runs: Runs) -> None:
    assert np.array_equal(runs["resumed", "early"].losses, runs["straight", "zero0_bf16"].losses)
    assert largest_difference(runs["resumed", "early"].weights, runs["straight", "zero0_bf16"].weights) == 0


def test_resuming_a_finished_run_trains_no_step_more(spawned: tuple[Any, Any], runs: Runs) -> None:
    assert runs["resumed", "finished"].rows == runs["straight", "zero0_bf16"].rows
    assert largest_difference(runs["resumed", "finished"].weights, runs["straight", "zero0_bf16"].weights) == 0
    assert spawned[0][1]["finished"] == ["latest", "step-00000006", "step-00000007"]


def test_patience_and_the_best_score_survive_a_stop(spawned: tuple[Any, Any]) -> None:
    straight, resumed, again = spawned[1]
    assert [row["weighted_f1"] for row in straight.dev] == [0.2, 0.5, 0.4, 0.5, 0.3]
    assert straight.position["step"] == 5, "three evaluations without a better one"
    assert (straight.position["best_step"], straight.position["best_score"]) == (2, 0.5)
    assert resumed.position == straight.position
    assert resumed.dev == straight.dev
    assert again.position == straight.position, "a run that stopped early has ended"
