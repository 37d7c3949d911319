import re
from pathlib import Path

import numpy as np
import pytest
from distributed import run_ranks
from training_fixtures import Trained, corpus, recipe, train

from jointfuse.errors import UserError

__all__ = ["corpus", "recipe"]

pytestmark = pytest.mark.required
BF16 = ("zero0_bf16", "zero1_bf16", "zero2_bf16", "zero2_offload_bf16", "zero3_bf16", "zero3_offload_bf16")
OFFLOAD = ("zero2_offload", "zero3_offload")
FP16 = ("zero0_fp16", "zero1_fp16", "zero2_fp16", "zero3_fp16")
STEPS = 5
Runs = dict[str, Trained | str]


def every_file(recipe: Path, folder: Path) -> Runs:
    """Each shipped DeepSpeed file: what was trained with it, or the line that refused it."""
    from jointfuse.train import deepspeed_file

    deepspeed_file.has_native_bf16, native = lambda: False, deepspeed_file.has_native_bf16
    runs: Runs = {}
    for name in ("zero2", "zero3", *BF16, *OFFLOAD, *FP16):
        settings = (f"train.deepspeed={name}", f"train.steps={STEPS}", "train.lr=1e-3")
        try:
            runs[name] = train(recipe, folder / name, *settings)
        except UserError as error:
            runs[name] = str(error)
    deepspeed_file.has_native_bf16 = native
    return runs


@pytest.fixture(scope="module")
def runs(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("precision")
    # The first use of a file that offloads compiles DeepSpeed's Adam for the CPU: minutes on a busy machine.
    result: Runs = run_ranks(2, every_file, folder / "ranks", recipe, folder, limit=580)[0]
    return result


@pytest.fixture(scope="module")
def said(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> str:
    """By rank 0 of those runs."""
    (log,) = tmp_path_factory.getbasetemp().glob("precision0/ranks/rank0.log")
    return log.read_text(encoding="utf-8")


def trained(runs: Runs, name: str) -> Trained:
    run = runs[name]
    assert isinstance(run, Trained), run
    assert run.losses.shape == (STEPS, 3)
    assert np.isfinite(run.losses).all()
    return run


@pytest.mark.parametrize("name", BF16)
def test_bf16_follows_float32_at_every_stage(runs: Runs, name: str) -> None:
    exact, half = trained(runs, "zero2"), trained(runs, name)
    away = np.abs(half.losses - exact.losses).max()
    assert 1e-6 < away < 0.02, "bf16 keeps 8 bits: 0.01 of a loss near 3"
    assert np.allclose(half.norms, exact.norms, rtol=0.05)


def test_a_training_says_at_its_beginning_that_bf16_is_slow_here(said: str) -> None:
    for name in BF16:
        line = f"train.deepspeed = '{name}': this CPU has no instructions for bf16"
        (before,) = re.findall(rf"^(.*)\n{re.escape(line)}", said, re.MULTILINE)
        assert before.endswith(f"{name} on cpu")
        assert f"choose train.deepspeed={name.removesuffix('_bf16')}\n" in said
    assert said.count("has no instructions") == len(BF16)


def test_stage_0_in_bf16_begins_with_adams_first_step_as_stage_1_does(runs: Runs) -> None:
    # DeepSpeed's wrapper for stage 0 takes a step of its own when it is made; counted, it changes losses by 0.03.
    assert np.abs(trained(runs, "zero0_bf16").losses - trained(runs, "zero1_bf16").losses).max() < 2e-3


@pytest.mark.parametrize("name", OFFLOAD)
def test_offloading_changes_no_number(runs: Runs, name: str) -> None:
    plain, offloaded = trained(runs, name.removesuffix("_offload")), trained(runs, name)
    assert np.abs(offloaded.losses - plain.losses).max() < 1e-5
    assert np.allclose(offloaded.norms, plain.norms, rtol=1e-4)


@pytest.mark.parametrize("name", FP16)
def test_fp16_trains_or_is_refused_in_one_line_that_names_the_setting_and_the_device(runs: Runs, name: str) -> None:
    run = runs[name]
    if isinstance(run, str):
        assert run.startswith(f"train.deepspeed = '{name}': this machine's device (cpu) cannot train in fp16; choose")
        assert "\n" not in run
    else:
        # The search for a loss scale that holds costs the first steps.
        taken = np.isfinite(run.losses).all(axis=1)
        assert taken.any()
        assert taken[taken.argmax() :].all()
