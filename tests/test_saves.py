"""A run that is killed while it saves, again and again."""

import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
from distributed import run_ranks
from pace import stretched
from running import LIMIT, saved_step, started, until
from safetensors.numpy import load_file
from training_fixtures import DROPOUT, corpus, largest_difference, recipe, train

__all__ = ["corpus", "recipe"]

KILLS = int(os.environ.get("SOAK_SAVES", "3"))  # tools/soak.sh saves
pytestmark = [pytest.mark.required, pytest.mark.timeout(1200 + 60 * KILLS)]
STEPS = 30 + 4 * KILLS
SETTINGS = (f"train.steps={STEPS}", "train.save_every=1 step", "train.choose_by=last", *DROPOUT)


def newest(run: Path) -> int:
    """The step whose checkpoint is being written or was written last; 0: none."""
    names = [path.name for path in (run / "checkpoints").glob("*step-*")]
    return max((int(name.partition("step-")[2].removesuffix(".partial")) for name in names), default=0)


def test_killed_at_any_moment_of_a_save_a_run_goes_on_from_a_whole_checkpoint(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    draw = random.Random(0)
    done = 0
    for number in range(KILLS + 1):
        asynchronous = f"train.save_async={number % 2 == 1}"
        options = [*SETTINGS, asynchronous, *(["--resume"] if number else [])]
        command = [sys.executable, "-m", "jointfuse.train", "--recipe", str(recipe), "--run", str(run), *options]
        with started(command, run, OMP_NUM_THREADS="1") as process:
            if number == KILLS:
                assert process.wait(stretched(2 * LIMIT)) == 0, (tmp_path / "output").read_text()
                break
            target = done + draw.randint(2, 4)
            until("it saves", lambda target=target: newest(run) >= target)
            # A save takes some 30 ms here, and what follows it until the next one as long.
            time.sleep(draw.uniform(0, 0.06))
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        assert saved_step(run) >= target - 2, "the last checkpoint that was named, or the one before it"
        done = saved_step(run)
    whole = run_ranks(1, train, tmp_path / "ranks", recipe, tmp_path / "whole", *SETTINGS)[0]
    assert saved_step(run) == STEPS
    assert largest_difference(load_file(run / "best" / "model.safetensors"), whole.weights) == 0
