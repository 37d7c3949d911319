import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import run_ranks
from helpers import planned_epoch
from safetensors.torch import load_file
from training_fixtures import (
    LABELS,
    Trained,
    corpus,
    largest_difference,
    outcome,
    recipe,
    scores,
    stage_file,
    train,
    trainer,
)

from jointfuse.config import Config, load_config
from jointfuse.data.plan import Plan
from jointfuse.data.reader import UtteranceReader
from jointfuse.data.shards import Corpus
from jointfuse.data.tokenizer import train_tokenizer
from jointfuse.model.network import Network, part_of

__all__ = ["corpus", "recipe"]

pytestmark = pytest.mark.required
GRADIENTS = {"both-2": "both", "both-3": "both", "text-2": "text", "audio-3": "audio"}  # name: modality; ZeRO stage
FROZEN = ("text_encoder", "vision_embed", "temperature")
Weights = dict[str, np.ndarray]


def gradients(recipe: Path, run: Path, *settings: str) -> tuple[Weights, Weights]:
    """Weights at the start, and the gradient of every trainable parameter for the first whole batch, on each rank."""
    from deepspeed.utils import safe_get_full_grad

    with trainer(recipe, run, *settings) as made:
        weights = outcome_weights(made)
        total, micro = next(made._batches())
        for batch in micro:
            made.engine.backward(made.engine(batch, total)["loss"])
        found = {}
        for name, parameter in made.engine.module.named_parameters():
            assert parameter.requires_grad
            found[name.removeprefix("network.")] = safe_get_full_grad(parameter).float().numpy()
        made.engine.step()
        return weights, found


def outcome_weights(made: Any) -> Weights:
    from jointfuse.train.engine import full_state

    return {name: tensor.float().numpy() for name, tensor in full_state(made.engine).items()}


def choose_by_given_scores(recipe: Path, run: Path, stage3: Path) -> Trained:
    """The best model must be that of step 4: neither the last one, nor a later one as good, nor the one of the highest
    score that is not asked for. Two epochs of 6 steps."""
    from jointfuse.train import loop

    given = {2: 0.1, 4: 0.6, 6: 0.6, 8: 0.5, 10: 0.55, 12: 0.2}
    settings = (f"train.deepspeed={stage3}", "train.batch=8", "train.epochs=2", "train.evaluate_every=2 steps")
    settings = (*settings, "train.choose_by=macro_f1")
    real = loop.score
    with trainer(recipe, run, *settings, "train.save_every=5 steps") as made:
        at_step_4: Weights = {}
        evaluate = made._evaluate

        def evaluate_and_keep() -> None:
            if made.position.step == 4:
                at_step_4.update(outcome_weights(made))
            evaluate()

        made._evaluate = evaluate_and_keep
        loop.score = lambda labels, predicted, names: (
            scores(names, 1 - given[made.position.step]) | {"macro_f1": given[made.position.step]}
        )
        try:
            made.train()
        finally:
            loop.score = real
        trained = outcome(made)
    trained.extra["at step 4"] = at_step_4
    return trained


def every_case(recipe: Path, stage3: Path, folder: Path) -> dict[str, Any]:
    cases: dict[str, Any] = {}
    for name, modality in GRADIENTS.items():
        file = stage3 if name.endswith("3") else "zero2"
        settings = (f"train.deepspeed={file}", f"model.modality={modality}", "train.batch=8")
        cases[f"gradients {name}"] = gradients(recipe, folder / name, *settings)

    settings = (
        f"train.deepspeed={stage3}",
        f"train.freeze=[{', '.join(FROZEN)}]",
        "train.part_lr={heads: 1.0e-5, joint: 5.0e-3}",
        "train.optimizer=adamw",
        "train.weight_decay=0.1",
        "train.steps=3",
    )
    with trainer(recipe, folder / "frozen", *settings) as made:
        before = outcome_weights(made)
        rates = {(group["part"], group["lr"]) for group in made.engine.optimizer.param_groups}
        temperature = made.engine.module.trained_temperature
        assert not temperature.requires_grad
        made.train()
        trained = outcome(made)
        trained.extra |= {"before": before, "rates": rates}
        cases["frozen"] = trained

    start = folder / "frozen" / "best"
    with trainer(recipe, folder / "started", f"train.init_from={start}") as made:
        cases["started"] = outcome_weights(made)

    cases["chosen"] = choose_by_given_scores(recipe, folder / "chosen", stage3)
    last = ("train.batch=8", "train.steps=4", "train.evaluate_every=2 steps", "train.choose_by=last")
    with trainer(recipe, folder / "last", *last) as made:
        made.train()
        cases["last"] = outcome(made)
    cases["means"] = train(recipe, folder / "means", *last, "train.evaluate_every=4 steps", "train.log_every=3")
    # At this rate nothing changes, so the first score is never beaten.
    cases["patient"] = train(
        recipe, folder / "patient", "train.lr=1e-20", "train.evaluate_every=2 steps", "train.patience=2"
    )
    epochs = ("train.batch=22", "train.steps=null", "train.epochs=3", "train.evaluate_every=2 epochs")
    cases["epochs"] = train(recipe, folder / "epochs", *epochs, "train.save_every=1 epoch", "train.keep_checkpoints=5")
    return cases


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trains")


@pytest.fixture(scope="module")
def cases(recipe: Path, folder: Path) -> dict[str, Any]:
    """Of rank 0; what rank 1 must answer alike is compared here."""
    first, second = run_ranks(2, every_case, folder / "ranks", recipe, stage_file(3, folder), folder)
    for name in GRADIENTS:
        ours, theirs = first[f"gradients {name}"][1], second[f"gradients {name}"][1]
        assert largest_difference(ours, theirs) == 0, "after the reduction all ranks have one gradient"
    result: dict[str, Any] = first
    return result


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("*step-*"))


# ----------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("name", GRADIENTS)
def test_every_trainable_parameter_receives_a_gradient(cases: dict[str, Any], name: str) -> None:
    weights, found = cases[f"gradients {name}"]
    assert found.keys() == weights.keys() | {"contrast.temperature.logarithm"}
    parts = {part_of(parameter, GRADIENTS[name]) for parameter in weights}
    wanted = {
        "both": {"text_encoder", "extractor", "language", "vision_embed", "vision_stem", "vision", "joint", "heads"},
        "text": {"text_encoder", "extractor", "language", "heads"},
        "audio": {"vision_embed", "vision_stem", "vision", "heads"},
    }
    assert parts == wanted[GRADIENTS[name]]
    # Softmax does not see a key bias: 1e-11, its rounding. The smallest other gradient is 4e-7.
    silent = [n for n, gradient in found.items() if np.abs(gradient).max() < 1e-9 and not n.endswith("key.bias")]
    assert not silent


@pytest.mark.parametrize("name", GRADIENTS)
def test_two_ranks_have_the_gradients_of_one_process_without_deepspeed(
    cases: dict[str, Any], recipe: Path, name: str
) -> None:
    weights, found = cases[f"gradients {name}"]
    config = load_config(str(recipe), [f"model.modality={GRADIENTS[name]}", "train.batch=8"])
    expected = plain_gradients(config, weights)
    for parameter, gradient in expected.items():
        assert np.allclose(found[parameter], gradient, rtol=1e-3, atol=1e-5), parameter


def network_of(config: Config, tokenizer_size: int) -> Network:
    return Network(config.model, len(LABELS), config.data.max_tokens, config.data.max_seconds, tokenizer_size)


def plain_gradients(config: Config, weights: Weights) -> Weights:
    """Autograd over the first whole batch, in this process."""
    from jointfuse.train.objective import Objective

    data = Corpus.open(config.data.corpus)
    split = data.split("train")
    tokenizer = train_tokenizer(split, 300) if config.model.modality != "audio" else None
    network = network_of(config, len(tokenizer) if tokenizer else 0)
    network.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    reader = UtteranceReader(split, config.data, tokenizer, network.reads_audio, data.mel_mean, data.mel_deviation)
    lengths = reader.positions(config.model.vision.patch)
    ids, valid = planned_epoch(Plan(lengths, config.train.batch, config.train.seed), 0)
    objective = Objective(network, config.loss, accumulation=1)
    objective(reader.batch((ids[0], valid[0])).to("cpu", reader.front_end), int(valid[0].sum()))["loss"].backward()
    return {
        name.removeprefix("network."): parameter.grad.numpy()
        for name, parameter in objective.named_parameters()
        if parameter.grad is not None
    }


# ----------------------------------------------------------------------------------------------------- parts of a model


def test_frozen_parts_stay_bit_for_bit_and_all_others_move(cases: dict[str, Any]) -> None:
    trained: Trained = cases["frozen"]
    before = trained.extra["before"]
    still = {name for name, value in trained.weights.items() if np.array_equal(value, before[name])}
    frozen = {name for name in before if part_of(name, "both") in FROZEN}
    assert frozen
    assert still == frozen


def test_each_part_has_its_own_learning_rate(cases: dict[str, Any]) -> None:
    trained: Trained = cases["frozen"]
    own = {part: rate for part, rate in trained.extra["rates"] if part in ("heads", "joint")}
    assert own == {"heads": 1e-5, "joint": 5e-3}
    assert {rate for part, rate in trained.extra["rates"] if part not in own} == {1e-3}
    moved = {
        name: float(np.abs(value - trained.extra["before"][name]).max()) for name, value in trained.weights.items()
    }
    by_part = {part: max(d for n, d in moved.items() if part_of(n, "both") == part) for part in ("heads", "joint")}
    assert by_part["heads"] < 1e-4
    assert by_part["joint"] > 5e-3


def test_only_a_lock_that_a_dead_build_left_is_removed(tmp_path: Path) -> None:
    from jointfuse.train.engine import LONGEST_BUILD, forget_dead_builds

    old, new = tmp_path / "cpu_adam" / "lock", tmp_path / "shm" / "lock"
    for lock, age in ((old, LONGEST_BUILD + 60), (new, LONGEST_BUILD - 60)):
        lock.parent.mkdir()
        lock.touch()
        os.utime(lock, (time.time() - age,) * 2)
    forget_dead_builds(tmp_path)
    assert (old.exists(), new.exists()) == (False, True)
    forget_dead_builds(tmp_path / "nothing")


def test_norms_biases_and_temperature_are_never_decayed(recipe: Path) -> None:
    from jointfuse.train.engine import parameter_groups
    from jointfuse.train.objective import Objective

    config = load_config(str(recipe), ["train.weight_decay=0.1", "train.part_lr={temperature: 1.0e-2}"])
    objective = Objective(network_of(config, 300), config.loss, accumulation=1)
    groups = parameter_groups(objective, config.train)
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert decay.keys() == {id(parameter) for parameter in objective.parameters()}
    for name, parameter in objective.named_parameters():
        spared = "norm" in name.lower() or name.endswith(".bias") or name == "contrast.temperature.logarithm"
        assert decay[id(parameter)] == (0.0 if spared else 0.1), name
    assert [group["lr"] for group in groups if group["part"] == "temperature"] == [1e-2]


def test_a_run_that_chooses_by_none_keeps_the_model_of_its_end(cases: dict[str, Any], folder: Path) -> None:
    trained: Trained = cases["last"]
    assert [row["best"] == row["weighted_f1"] for row in trained.dev] == [True, True]
    assert trained.position["best_step"] == 4
    kept = load_file(folder / "last" / "best" / "model.safetensors")
    assert largest_difference({name: tensor.float().numpy() for name, tensor in kept.items()}, trained.weights) == 0


def test_a_line_of_the_log_holds_the_means_of_the_steps_since_the_line_before(cases: dict[str, Any]) -> None:
    of_every_step = cases["last"].losses
    lines = [row for row in cases["means"].rows if row["kind"] == "train"]
    assert [row["step"] for row in lines] == [3, 4]
    for row, steps in zip(lines, (of_every_step[:3], of_every_step[3:]), strict=True):
        assert [row["loss"], row["loss_erc"], row["loss_icl"]] == pytest.approx(steps.mean(axis=0), abs=1e-6, rel=0)


def test_a_run_starts_from_an_exported_model(cases: dict[str, Any], folder: Path) -> None:
    exported = load_file(folder / "frozen" / "best" / "model.safetensors")
    assert largest_difference(cases["started"], {name: tensor.numpy() for name, tensor in exported.items()}) == 0


# ------------------------------------------------------------------------------------ evaluations, checkpoints, the end


def test_the_best_model_is_that_of_the_first_highest_dev_score(cases: dict[str, Any], folder: Path) -> None:
    trained: Trained = cases["chosen"]
    assert [(row["step"], row["macro_f1"], row["best"]) for row in trained.dev] == [
        (2, 0.1, 0.1),
        (4, 0.6, 0.6),
        (6, 0.6, None),
        (8, 0.5, None),
        (10, 0.55, None),
        (12, 0.2, None),
    ]
    assert (trained.position["best_step"], trained.position["best_score"]) == (4, 0.6)
    best = folder / "chosen" / "best"
    assert sorted(path.name for path in best.iterdir()) == ["model.json", "model.safetensors", "tokenizer"]
    description = json.loads((best / "model.json").read_text(encoding="utf-8"))
    assert (description["info"]["step"], description["info"]["dev"]["macro_f1"]) == (4, 0.6)
    held = {name: tensor.numpy() for name, tensor in load_file(best / "model.safetensors").items()}
    assert largest_difference(held, trained.extra["at step 4"]) == 0
    assert largest_difference(held, trained.weights) > 1e-3, "the last model is another one"


def test_checkpoints_come_every_so_many_steps_and_at_the_end_and_old_ones_go(
    cases: dict[str, Any], folder: Path
) -> None:
    assert cases["chosen"].position["step"] == 12
    assert checkpoints(folder / "chosen") == ["step-00000010", "step-00000012"]
    latest = (folder / "chosen" / "checkpoints" / "latest").read_text(encoding="utf-8")
    assert latest == "step-00000012\n"


def test_intervals_may_be_counted_in_epochs(cases: dict[str, Any], folder: Path) -> None:
    assert cases["epochs"].position["epoch"] == 3
    assert [row["step"] for row in cases["epochs"].dev] == [4, 6], "every second epoch of 2 steps, and the end"
    assert checkpoints(folder / "epochs") == ["step-00000002", "step-00000004", "step-00000006"]


def test_a_run_out_of_patience_stops_early(cases: dict[str, Any], folder: Path) -> None:
    position = cases["patient"].position
    assert (position["best_step"], position["step"]) == (2, 6), "two evaluations without a better one, of 20 steps"
    assert (folder / "patient" / "status").read_text() == "finished\n"
    assert checkpoints(folder / "patient") == ["step-00000006"]
