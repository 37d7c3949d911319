"""A run goes on with another number of ranks, another ZeRO stage, or Adam elsewhere, as if it had never moved."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from corpus_helpers import hashes
from distributed import run_ranks
from training_fixtures import (
    Stopped,
    Trained,
    corpus,
    die_after,
    largest_difference,
    moved,
    outcome,
    recipe,
    stage_file,
    trainer,
)

from jointfuse.config import load_config
from jointfuse.errors import UserError

__all__ = ["corpus", "recipe"]

pytestmark = pytest.mark.required
STAGES = (0, 1, 2, 3)
SETTINGS = (
    "train.batch=8",
    "train.save_every=2 steps",
)  # an epoch has 6 steps, the last with 3 utterances and 5 fillers
# float32; sums in another order are all that may differ. Stages alone: 1e-5 (test_zero.py).
LOSS_TOLERANCE = 1e-4
BF16_TOLERANCE = 0.01
State = dict[str, np.ndarray]


class Run(NamedTuple):
    """Three steps, straight through or the third of them alone, and what was held between the second and it."""

    trained: Trained
    state: State  # float32 weights and moments of Adam, whole; buffers
    counts: set[int]  # Adam's, of all tensors


def held(made: Any) -> tuple[State, set[int]]:
    """By DeepSpeed's own getters, where it has some."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    engine, adam = made.engine, made.engine.basic_optimizer
    copies = {}
    if hasattr(engine.optimizer, "fp32_groups"):  # stage 0 in bf16 has a float32 copy of every parameter
        for halves, wholes in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True):
            copies |= dict(zip(halves, wholes, strict=True))
    if engine.zero_optimization_stage() in (1, 2):
        # DeepSpeed does so in the step of the first group of parameters, when the others have no moments yet.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    tensors = dict(engine.module.named_buffers())
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        for key in ("exp_avg", "exp_avg_sq"):
            if engine.zero_optimization_stage():
                tensors[f"{name} {key}"] = safe_get_full_optimizer_state(parameter, key)
            else:
                tensors[f"{name} {key}"] = adam.state[copies.get(parameter, parameter)][key]
        tensors[name] = safe_get_full_fp32_param(parameter) if engine.zero_optimization_stage() else parameter
        tensors[name] = copies.get(parameter, tensors[name])
    state = {name: tensor.detach().float().cpu().numpy().copy() for name, tensor in tensors.items()}
    return state, {int(kept["step"]) for kept in adam.state.values()}


def begin(recipe: Path, run: Path, *settings: str) -> Run:
    """Three steps; the latest checkpoint is that of the second afterwards."""
    import deepspeed
    import torch.distributed as dist

    with trainer(recipe, run, "train.steps=3", *SETTINGS, *settings) as made:
        frozen = [parameter for parameter in made.engine.module.parameters() if not parameter.requires_grad]
        sharded = made.engine.zero_optimization_stage() == 3
        with deepspeed.zero.GatheredParameters(frozen, modifier_rank=0, enabled=sharded):
            for parameter in frozen:
                parameter.data.mul_(2)  # those of a checkpoint, not those that a seed makes
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


def begin_all(recipe: Path, files: dict[Any, str], folder: Path, *settings: str) -> dict[Any, Run]:
    return {key: begin(recipe, folder / str(key), f"train.deepspeed={file}", *settings) for key, file in files.items()}


def go_on_all(recipe: Path, files: dict[Any, str], folder: Path, pairs: Any, *settings: str) -> dict[Any, Run]:
    runs = {}
    for before, after in pairs:
        again = folder / f"{before} to {after}"
        runs[before, after] = go_on(recipe, folder / str(before), again, f"train.deepspeed={files[after]}", *settings)
    return runs


def check(run: Run, straight: Run, tolerance: float) -> None:
    assert run.counts == straight.counts == {2}
    assert run.state.keys() == straight.state.keys()
    assert largest_difference(run.state, straight.state) == 0
    assert len(run.trained.losses) == 3
    assert np.abs(run.trained.losses - straight.trained.losses).max() < tolerance


# ----------------------------------------------------------------------------------------------------- pairs of stages

PAIRS = [(before, after) for before in STAGES for after in STAGES]
GROWS, SHRINKS = ([pair for pair in PAIRS if sum(pair) % 2 == rest] for rest in (0, 1))  # 1 to 2 ranks, 2 to 1


@pytest.fixture(scope="module")
def pairs(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Any], dict[Any, Run]]:
    """The folder of the runs; by ranks and stage, runs that stay; by pair of stages, runs that move."""
    folder = tmp_path_factory.mktemp("pairs")
    files = {stage: str(stage_file(stage, folder)) for stage in STAGES}
    stay: dict[int, Any] = {}
    found: dict[Any, Run] = {}
    for ranks in (1, 2):
        stay[ranks] = run_ranks(ranks, begin_all, folder / f"begin{ranks}", recipe, files, folder / f"from{ranks}")[0]
    for ranks, chosen in ((1, SHRINKS), (2, GROWS)):
        source = folder / f"from{3 - ranks}"
        found |= run_ranks(ranks, go_on_all, folder / f"go-on{ranks}", recipe, files, source, chosen)[0]
    return folder, stay, found


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_weights_moments_and_steps_survive_a_move_between_any_two_stages(pairs: Any, before: int, after: int) -> None:
    _, stay, found = pairs
    check(found[before, after], stay[1 if (before, after) in GROWS else 2][before], LOSS_TOLERANCE)


# ----------------------------------------------------------------------------- bf16, a frozen part, a queue; offloading

BF16 = {stage: f"zero{stage}_bf16" for stage in STAGES}
BF16_PAIRS = [(0, 3), (1, 0), (2, 1), (3, 2)]
QUEUE = ("train.freeze=[text_encoder]", "loss.pool=queue", "loss.queue=20")
OFFLOAD = {name: name for name in ("zero1", "zero2_offload", "zero3_offload")}
OFFLOAD_PAIRS = [("zero1", "zero2_offload"), ("zero2_offload", "zero3_offload"), ("zero3_offload", "zero1")]


@pytest.mark.parametrize(
    ("files", "chosen", "settings", "tolerance"),
    [(BF16, BF16_PAIRS, QUEUE, BF16_TOLERANCE), (OFFLOAD, OFFLOAD_PAIRS, (), LOSS_TOLERANCE)],
    ids=["bf16", "offload"],
)
def test_float32_copies_frozen_parts_queues_and_offloaded_moments_survive_exactly(
    recipe: Path, tmp_path: Path, files: Any, chosen: Any, settings: tuple[str, ...], tolerance: float
) -> None:
    # The first use of a file that offloads compiles DeepSpeed's Adam for the CPU: minutes on a busy machine.
    runs = tmp_path / "runs"
    stay = run_ranks(2, begin_all, tmp_path / "ranks2", recipe, files, runs, *settings, limit=580)[0]
    found = run_ranks(1, go_on_all, tmp_path / "ranks1", recipe, files, runs, chosen, *settings)[0]
    for (before, after), run in found.items():
        check(run, stay[before], tolerance)
        weights, straight = run.trained.weights, stay[before].trained.weights
        for name in weights:
            if settings and name.startswith("text_encoder."):
                assert np.array_equal(weights[name], straight[name]), f"{before} to {after}: {name}"
        if settings:
            assert run.state["contrast.past_rows"] == 16


# ---------------------------------------------------------------------------------------------------- a run that moves


def live(recipe: Path, run: Path, resume: bool, stop_after: int | None, *settings: str) -> tuple[Trained, set[int]]:
    """A life of seven steps, or a part of it; Adam's counts at its end."""
    more = ("train.batch=8", "train.steps=7", "train.save_every=2 steps")
    with trainer(recipe, run, *more, *settings, resume=resume) as made:
        die_after(made, stop_after)
        try:
            made.train()
        except Stopped:
            made.log and made.log.close()
        return outcome(made), held(made)[1]


def test_a_run_that_moves_twice_has_the_losses_of_one_that_never_did(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    files = [f"train.deepspeed={stage_file(stage, tmp_path)}" for stage in STAGES]
    never = (recipe, tmp_path / "still", False, None, files[1], "train.micro_batch=2")
    straight, counts = run_ranks(2, live, tmp_path / "straight", *never)[0]
    for ranks, stage, micro, stop in ((2, 1, 2, 3), (4, 3, 1, 4), (1, 2, 4, None)):
        life = (recipe, run, ranks != 2, stop, files[stage], f"train.micro_batch={micro}")
        last, moved_counts = run_ranks(ranks, live, tmp_path / f"ranks{ranks}", *life)[0]
    assert len(last.losses) == 7
    assert np.abs(last.losses - straight.losses).max() < LOSS_TOLERANCE
    assert largest_difference(moved(last.weights), moved(straight.weights)) < LOSS_TOLERANCE
    assert last.dev == straight.dev
    assert moved_counts == counts == {7}
    assert last.position == straight.position | {
        key: last.position[key] for key in ("world_size", "stage", "files", "best_score")
    }
    assert (last.position["world_size"], last.position["stage"]) == (1, 2)
    said = {ranks: (tmp_path / f"ranks{ranks}" / "rank0.log").read_text(encoding="utf-8") for ranks in (4, 1)}
    assert "resumed at step 2 (epoch 1, batch 2), from 2 ranks ZeRO-1 to 4 ranks ZeRO-3\n" in said[4]
    assert "resumed at step 4 (epoch 1, batch 4), from 4 ranks ZeRO-3 to 1 rank ZeRO-2\n" in said[1]


# ------------------------------------------------------------------------------------------------ what goes wrong


def spoilt(recipe: Path, run: Path, file: str) -> tuple[str, bool]:
    """What a rank says to a shard cut short; whether the run is byte for byte as it was. Then one that is killed."""
    from jointfuse.train import resize

    resumed = (recipe, run, "train.steps=3", *SETTINGS, f"train.deepspeed={file}")
    (shard,) = run.glob("checkpoints/step-*/zero_pp_rank_1_*_optim_states.pt")
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    before = hashes(run)
    with pytest.raises(UserError) as refused, trainer(*resumed, resume=True):
        raise AssertionError("nothing should have been read")
    intact = hashes(run) == before
    shard.write_bytes(whole)
    before = hashes(run)
    trained = resize._Saved.trained

    def read_or_die(self: Any, name: str, key: str, numel: int) -> Any:
        if "extractor" in name:
            raise Stopped
        return trained(self, name, key, numel)

    resize._Saved.trained = read_or_die  # type: ignore[method-assign]
    try:
        with pytest.raises(Stopped), trainer(*resumed, resume=True):
            raise AssertionError("it should have died before")
    finally:
        resize._Saved.trained = trained  # type: ignore[method-assign]
    intact &= hashes(run) == before
    with trainer(*resumed, resume=True) as made:
        made.train()
    return str(refused.value), intact


def test_a_move_that_fails_or_is_cut_off_leaves_the_run_as_it_was(pairs: Any, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(pairs[0] / "from2" / "1", run)
    says, intact = run_ranks(1, spoilt, tmp_path / "ranks", recipe, run, str(stage_file(3, tmp_path)))[0]
    shard = run / "checkpoints" / "step-00000002" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    assert says.startswith(f"{shard}: damaged or cut off: no whole checkpoint is left; start a new run")
    assert "\n" not in says
    assert intact


def test_what_the_ranks_accept_is_accepted_before_they_start(pairs: Any, recipe: Path) -> None:
    from jointfuse.launch import check_train

    run = pairs[0] / "from2" / "3"
    for ranks in (1, 2, 4, 8):
        for file in ("zero0", "zero1", "zero2_offload", "zero3"):
            settings = ["train.steps=3", *SETTINGS, f"train.deepspeed={file}", "train.micro_batch=1"]
            check_train(load_config(str(recipe), settings), run, True, ranks)
    with pytest.raises(UserError, match=r"train\.batch = 8 cannot be divided over 3 ranks"):
        check_train(load_config(str(recipe), ["train.steps=3", *SETTINGS]), run, True, 3)


@pytest.mark.parametrize(
    ("pool", "before", "now", "says"),
    [
        ("step", (2, "train.micro_batch=3"), (3, "train.micro_batch=1"), None),
        ("micro", (2, "train.micro_batch=3"), (3, "train.micro_batch=2"), None),
        ("micro", (2, "train.micro_batch=null"), (4, "train.micro_batch=null"), None),
        (
            "micro",
            (2, "train.micro_batch=3"),
            (3, "train.micro_batch=null"),
            "loss.pool = micro had 6 utterances of all ranks at once, this run's has 12; resume with "
            "train.micro_batch=2",
        ),
        (
            "queue",
            (2, "train.micro_batch=3"),
            (4, "train.micro_batch=3"),
            "loss.pool = queue had 6 utterances of all ranks at once, this run's has 12; resume with --ranks 2 "
            "train.micro_batch=3",
        ),
    ],
)
def test_a_pool_that_would_change_is_refused_with_what_keeps_it(
    recipe: Path, pool: str, before: tuple[int, str], now: tuple[int, str], says: str | None
) -> None:
    from jointfuse.train.engine import Layout
    from jointfuse.train.resize import check_resize

    settings = ["train.batch=12", f"loss.pool={pool}", f"loss.queue={4 * (pool == 'queue')}"]
    written, config = (load_config(str(recipe), [*settings, micro]) for _, micro in (before, now))
    layouts = Layout(before[0], 1), Layout(now[0], 2)
    if says is None:
        check_resize(Path("c"), written, layouts[0], config, layouts[1])
        return
    with pytest.raises(UserError) as refused:
        check_resize(Path("c"), written, layouts[0], config, layouts[1])
    assert str(refused.value) == f"c: {says}"


def test_state_on_nvme_is_refused(recipe: Path, tmp_path: Path) -> None:
    from jointfuse.train.engine import Layout
    from jointfuse.train.resize import check_resize

    config = load_config(str(recipe), [])
    before, now = Layout(2, 3), Layout(4, 3)
    check_resize(tmp_path, config, before, config, now)
    (tmp_path / "offloaded_tensors").mkdir()
    check_resize(tmp_path, config, before, config, replace(now, world_size=2))
    with pytest.raises(UserError, match="state on NVMe cannot be converted from 2 ranks ZeRO-3 to 4 ranks ZeRO-3"):
        check_resize(tmp_path, config, before, config, now)


def test_a_loss_scale_found_by_trial_is_carried_between_every_two_scalers_of_fp16() -> None:
    from types import SimpleNamespace

    import torch
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaleConfig, LossScaler

    from jointfuse.train.resize import carry_loss_scale

    def sharded() -> Any:
        return SimpleNamespace(loss_scaler=DynamicLossScaler(2**16, 1000, 1, 2, False))

    def whole() -> Any:
        return SimpleNamespace(loss_scale_config=LossScaleConfig(torch.float16, True, 1.0, None))

    found = {"cur_scale": 512.0, "cur_iter": 40, "last_overflow_iter": 7}
    for after in (sharded(), whole()):
        carry_loss_scale(found, after)
        scaler = vars(after).popitem()[1]
        assert (scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter) == (512.0, 40, 7)
    still = SimpleNamespace(loss_scaler=LossScaler(128))
    carry_loss_scale(found, still)
    assert still.loss_scaler.cur_scale == 128, "set in the DeepSpeed file"
    fresh = sharded()
    carry_loss_scale({"cur_scale": 1.0}, fresh)
    assert fresh.loss_scaler.cur_scale == 2**16, "where the run's was not found by trial"
