"""A run goes on with another number of ranks, another ZeRO stage, or Adam elsewhere, as if it had never moved."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from corpus_helpers import hashes
from distributed import run_ranks
from training_fixtures import Trained, corpus, outcome, recipe, stage_file, train, trainer

from jointfuse.errors import UserError

__all__ = ["corpus", "recipe"]

pytestmark = pytest.mark.required
STAGES = (0, 1, 2, 3)
# float32; an epoch has 6 batches of 8, the last with 3 utterances and 5 fillers.
SETTINGS = ("train.batch=8", "train.save_every=1 step", "train.keep_checkpoints=9")
LOSS_TOLERANCE = 1e-4
Adam = dict[str, np.ndarray]  # whole and in float32: NAME.fp32, NAME.exp_avg, NAME.exp_avg_sq


class Run(NamedTuple):
    """Three steps straight through or from the second on; what it held at the second."""

    trained: Trained
    adam: Adam
    counts: set[int]  # Adam's steps, of all tensors


def held(made: Any) -> tuple[Adam, set[int]]:
    """What Adam holds and has counted, by DeepSpeed's own getters, on every rank."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    engine, adam = made.engine, made.engine.basic_optimizer
    master = {}
    if hasattr(engine.optimizer, "fp32_groups"):  # stage 0 in bf16 has a float32 copy of every parameter
        for halves, wholes in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True):
            master |= dict(zip(halves, wholes, strict=True))
    if engine.zero_optimization_stage() in (1, 2):
        # DeepSpeed does so after the first step of the first group, when other groups have no moments yet.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    found = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad and engine.zero_optimization_stage() == 0:
            whole = master.get(parameter, parameter)
            tensors = {"fp32": whole, **adam.state[whole]}
        elif parameter.requires_grad:
            tensors = {key: safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")}
            tensors["fp32"] = safe_get_full_fp32_param(parameter)
        else:
            tensors = {}
        for key in tensors.keys() - {"step"}:
            found[f"{name}.{key}"] = tensors[key].detach().cpu().numpy().copy()
    return found, {int(state["step"]) for state in adam.state.values()}


def begin(recipe: Path, run: Path, *settings: str) -> Run:
    """Three steps; the checkpoint of the second is the run's latest afterwards."""
    import torch.distributed as dist

    with trainer(recipe, run, "train.steps=3", *SETTINGS, *settings) as made:
        save, found = made.engine.save_checkpoint, []

        def look_and_save(*arguments: Any, **options: Any) -> None:
            if made.position.step == 2:
                found.extend(held(made))
            save(*arguments, **options)

        made.engine.save_checkpoint = look_and_save
        made.train()
        result = Run(outcome(made), *found)
    if dist.get_rank() == 0:
        shutil.rmtree(run / "checkpoints" / "step-00000003")
        (run / "checkpoints" / "latest").write_text("step-00000002\n", encoding="utf-8")
    dist.barrier()
    return result


def go_on(recipe: Path, run: Path, again: Path, *settings: str) -> Run:
    """The third step of a copy of the run, with other settings."""
    import torch.distributed as dist

    if dist.get_rank() == 0:
        shutil.copytree(run, again)
    dist.barrier()
    with trainer(recipe, again, "train.steps=3", *SETTINGS, *settings, resume=True) as made:
        found = held(made)
        made.train()
        return Run(outcome(made), *found)


def begin_all(recipe: Path, files: dict[Any, str], folder: Path) -> dict[Any, Run]:
    return {key: begin(recipe, folder / str(key), f"train.deepspeed={file}") for key, file in files.items()}


def go_on_all(recipe: Path, files: dict[Any, str], folder: Path, pairs: list[tuple[Any, Any]]) -> dict[Any, Run]:
    return {
        (before, after): go_on(
            recipe, folder / str(before), folder / f"{before} to {after}", f"train.deepspeed={files[after]}"
        )
        for before, after in pairs
    }


# ----------------------------------------------------------------------------------------------------- pairs of stages

PAIRS = [(before, after) for before in STAGES for after in STAGES]
GROWS, SHRINKS = ([pair for pair in PAIRS if sum(pair) % 2 == rest] for rest in (0, 1))  # 1 to 2 ranks, 2 to 1


@pytest.fixture(scope="module")
def pairs(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, dict[int, Run]], dict[Any, Run]]:
    """By ranks and stage, runs that stay; by pair of stages, runs that move."""
    folder = tmp_path_factory.mktemp("pairs")
    files = {stage: str(stage_file(stage, folder)) for stage in STAGES}
    stay, moved = {}, {}
    for ranks in (1, 2):
        stay[ranks] = run_ranks(ranks, begin_all, folder / f"begin{ranks}", recipe, files, folder / f"from{ranks}")[0]
    for ranks, chosen in ((1, SHRINKS), (2, GROWS)):
        source = folder / f"from{3 - ranks}"
        moved |= run_ranks(ranks, go_on_all, folder / f"go-on{ranks}", recipe, files, source, chosen)[0]
    return stay, moved


def same(one: Adam, other: Adam) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_weights_moments_and_steps_survive_a_move_between_any_two_stages(pairs: Any, before: int, after: int) -> None:
    stay, moved = pairs
    ranks = 1 if (before, after) in GROWS else 2
    run, straight = moved[before, after], stay[ranks][before]
    assert run.counts == straight.counts == {2}
    assert same(run.adam, straight.adam)
    assert len(run.trained.losses) == 3
    assert np.abs(run.trained.losses - straight.trained.losses).max() < LOSS_TOLERANCE
