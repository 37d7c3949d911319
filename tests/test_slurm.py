"""Trainings as Slurm jobs on two nodes: preempted, killed, robbed of a node, and in the end as if nothing had been."""

import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from distributed import run_ranks
from running import losses, processes_of, saved_step, step_of, until
from slurm_cluster import Cluster
from training_fixtures import DROPOUT, corpus, recipe, train

__all__ = ["corpus", "recipe"]

pytestmark = pytest.mark.required
PROJECT = Path(__file__).resolve().parents[1]
STEPS = 40
SETTINGS = (f"train.steps={STEPS}", "train.save_every=5 steps", "data.workers=1", *DROPOUT)
LIMIT = 240  # seconds for a start and the steps that are waited for


@pytest.fixture(scope="module")
def slurm(running_cluster: Cluster) -> Iterator[Cluster]:
    yield running_cluster
    running_cluster.clear()


def ranks_of(run: Path) -> list[int]:
    """Of both nodes; not their decoding processes, whose parents have the run on their command lines too."""
    found = []
    for process in processes_of(run):
        command = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
        parent = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        launched = b"deepspeed.launcher.launch" in Path(f"/proc/{parent}/cmdline").read_bytes()
        if launched and b"jointfuse.train" in command:
            found.append(process)
    return found


def submit(slurm: Cluster, nodes: str, recipe: Path, run: Path, *settings: str) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), slurm.environment["PATH"]])
    arguments = ["--recipe", str(recipe), "--run", str(run), "--ranks", "1", *settings]
    return slurm.sbatch(f"--nodes={nodes}", "slurm/train.sbatch", *arguments, cwd=PROJECT, environment={"PATH": path})


def test_preempted_and_killed_a_job_ends_with_the_losses_of_one_that_never_was(
    slurm: Cluster, recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = submit(slurm, "2", recipe, run, *SETTINGS)
    slurm.wait_for(job, rf"step \d+/{STEPS}", limit=LIMIT)
    slurm.signal(job, "USR2")
    slurm.wait_for(job, r"status 3, to be started again", limit=LIMIT)
    stopped = saved_step(run)
    assert f"stopped at step {stopped} when asked to" in slurm.output(job)
    assert processes_of(run) == []
    slurm.wait_for(job, rf"resumed at step {stopped} ", limit=LIMIT)
    until("five steps more", lambda: step_of(run) >= stopped + 5)
    os.kill(ranks_of(run)[-1], signal.SIGKILL)
    slurm.wait_for(job, r"status [^3].*, to be started again", limit=LIMIT)
    slurm.wait(job, "COMPLETED", limit=LIMIT)
    assert len(re.findall("resumed at step", slurm.output(job))) == 2
    assert processes_of(run) == []
    assert (run / "status").read_text() == "finished\n"
    whole = run_ranks(2, train, tmp_path / "ranks", recipe, tmp_path / "whole", *SETTINGS)[0]
    rows = {row["step"]: row["loss"] for row in whole.rows if row["kind"] == "train"}
    last = 0
    for step, loss in sorted(losses(run).items()):
        assert loss == pytest.approx(np.mean([rows[one] for one in range(last + 1, step + 1)]), abs=1e-6, rel=0)
        last = step
    assert last == STEPS
