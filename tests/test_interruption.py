"""Runs that are told to stop, or lose the process that started them."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
from distributed import run_ranks
from pace import stretched
from running import (
    LIMIT,
    PROGRAM,
    RECORDED,
    assert_same_steps,
    processes_of,
    saved_step,
    started,
    step_of,
    until,
)
from training_fixtures import DROPOUT, corpus, recipe, train

__all__ = ["corpus", "recipe"]

pytestmark = [pytest.mark.required, pytest.mark.timeout(1800)]
STEPS = 40
SETTINGS = (f"train.steps={STEPS}", "data.workers=1", RECORDED, *DROPOUT)


def command(recipe: Path, run: Path, *options: str) -> list[str]:
    return [PROGRAM, "train", "--recipe", str(recipe), "--run", str(run), "--ranks", "2", *options, *SETTINGS]


def test_a_run_that_is_stopped_killed_and_resumed_has_the_losses_of_one_that_never_was(
    recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    output = tmp_path / "output"
    with started(command(recipe, run), run) as process:
        until("ten steps", lambda: process.poll() is not None or step_of(run) >= 10)
        for _ in range(2):
            os.kill(process.pid, signal.SIGUSR2)
            time.sleep(0.02)
        assert process.wait(stretched(LIMIT)) == 3, output.read_text()
        assert processes_of(run) == []
        stopped = saved_step(run)
        assert 10 <= stopped < STEPS
        assert f"stopped at step {stopped} when asked to" in output.read_text()
        assert (run / "status").read_text() == "stopped\n"
    # The process that a user sees is killed: everything that it had started ends with it.
    with started(command(recipe, run, "--resume"), run) as process:
        until("it goes on", lambda: process.poll() is not None or "resumed at step" in output.read_text())
        until("some steps more", lambda: process.poll() is not None or step_of(run) > stopped)
        os.kill(process.pid, signal.SIGKILL)
        until("nothing is left", lambda: processes_of(run) == [])
    with started(command(recipe, run, "--resume"), run) as process:
        assert process.wait(stretched(LIMIT)) == 0, output.read_text()
    assert (run / "status").read_text() == "finished\n"
    run_ranks(2, train, tmp_path / "ranks", recipe, tmp_path / "whole", *SETTINGS)
    assert_same_steps(run, tmp_path / "whole", tolerance=1e-6)


def test_a_rank_that_hangs_ends_the_job_and_the_other_says_where(recipe: Path, tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "output"
    with started([*command(recipe, run), "train.longest_step=6"], run) as process:
        until("ten steps", lambda: process.poll() is not None or step_of(run) >= 10)
        ranks = [one for one in processes_of(run) if "RANK=1" in environment_of(one) and is_rank(one)]
        os.kill(ranks[0], signal.SIGSTOP)
        assert process.wait(stretched(LIMIT)) == 1
        assert processes_of(run) == []
    assert re.search(
        r"error: rank 0: step \d+ has taken more than train.longest_step = 6 s: this rank, another one or the network "
        r"hangs; --resume goes on from the last checkpoint\n",
        output.read_text(),
    )


def environment_of(process: int) -> list[str]:
    return Path(f"/proc/{process}/environ").read_bytes().decode().split("\0")


def is_rank(process: int) -> bool:
    """And not a decoding process of one."""
    parent = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    return "deepspeed.launcher.launch" in Path(f"/proc/{parent}/cmdline").read_text()
