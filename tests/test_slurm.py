"""Trainings as Slurm jobs on two nodes: preempted, killed, robbed of a node, and in the end as if nothing had been."""

import os
import re
import signal
import sys
from pathlib import Path

import pytest
from distributed import run_ranks
from running import RECORDED, assert_same_steps, losses, processes_of, saved_step, step_of, until
from slurm_cluster import Cluster
from training_fixtures import DROPOUT, corpus, recipe, train

from jointfuse.train.whole import latest_checkpoint

__all__ = ["corpus", "recipe"]

pytestmark = [pytest.mark.required, pytest.mark.timeout(1800)]
PROJECT = Path(__file__).resolve().parents[1]
STEPS = 40
SETTINGS = (f"train.steps={STEPS}", "train.save_every=5 steps", "data.workers=1", RECORDED, *DROPOUT)
LIMIT = 500  # seconds for a start and the steps that are waited for


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


def submit(cluster: Cluster, nodes: str, recipe: Path, run: Path, *settings: str) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), cluster.environment["PATH"]])
    arguments = ["--recipe", str(recipe), "--run", str(run), "--ranks", "1", *settings]
    return cluster.sbatch(f"--nodes={nodes}", "slurm/train.sbatch", *arguments, cwd=PROJECT, environment={"PATH": path})


def test_preempted_and_killed_a_job_ends_with_the_losses_of_one_that_never_was(
    cluster: Cluster, recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = submit(cluster, "2", recipe, run, *SETTINGS)
    cluster.wait_for(job, rf"step \d+/{STEPS}", limit=LIMIT)
    cluster.signal(job, "USR2")
    cluster.wait_for(job, r"status 3, to be started again", limit=LIMIT)
    stopped = saved_step(run)
    assert f"stopped at step {stopped} when asked to" in cluster.output(job)
    assert processes_of(run) == []
    cluster.wait_for(job, rf"resumed at step {stopped} ", limit=LIMIT)
    until("five steps more", lambda: step_of(run) >= stopped + 5)
    os.kill(ranks_of(run)[-1], signal.SIGKILL)
    cluster.wait_for(job, r"status [^3].*, to be started again", limit=LIMIT)
    cluster.wait(job, "COMPLETED", limit=LIMIT)
    assert len(re.findall("resumed at step", cluster.output(job))) == 2
    assert processes_of(run) == []
    assert (run / "status").read_text() == "finished\n"
    run_ranks(2, train, tmp_path / "ranks", recipe, tmp_path / "whole", *SETTINGS)
    assert_same_steps(run, tmp_path / "whole", tolerance=1e-6)


def test_without_its_second_node_a_job_goes_on_with_half_the_ranks(
    cluster: Cluster, recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = (f"train.steps={STEPS}", "train.save_every=5 steps", "train.deepspeed=zero1", RECORDED)
    job = submit(cluster, "1-2", recipe, run, *settings)
    cluster.wait_for(job, rf"step \d+/{STEPS}", limit=LIMIT)
    until("a checkpoint", lambda: latest_checkpoint(run) is not None)
    assert cluster.job(job)["NumNodes"] == "2"
    cluster.kill_node("nodeB")
    cluster.wait_for(job, r"resumed at step \d+ .*, from 2 ranks ZeRO-1 to 1 rank ZeRO-1", limit=LIMIT)
    cluster.wait(job, "COMPLETED", limit=LIMIT)
    assert (cluster.job(job)["NumNodes"], cluster.job(job)["NodeList"]) == ("1", "nodeA")
    assert processes_of(run) == []
    run_ranks(2, train, tmp_path / "ranks", recipe, tmp_path / "whole", *settings)
    assert_same_steps(run, tmp_path / "whole", tolerance=1e-4)


def test_out_of_time_and_requeued_a_job_stops_with_a_checkpoint_and_goes_on(
    cluster: Cluster, recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    constant = ("train.decay=constant", "train.warmup=0")  # the losses do not depend on the number of steps
    settings = ("train.steps=400", "train.save_every=1000 steps", *constant, RECORDED, *DROPOUT)
    job = submit(cluster, "1", recipe, run, *settings)
    cluster.wait_for(job, r"step \d+/400", limit=LIMIT)
    # Slurm looks at the clock twice a minute, and wakes whom it warns; until then the run stands still.
    (rank,) = ranks_of(run)
    os.kill(rank, signal.SIGSTOP)
    cluster.run("scontrol", "update", f"jobid={job}", "timelimit=2")
    cluster.wait_for(job, r"status 3, to be started again", limit=LIMIT)
    cluster.run("scontrol", "update", f"jobid={job}", "timelimit=UNLIMITED")
    stopped = saved_step(run)
    cluster.wait_for(job, rf"resumed at step {stopped} ", limit=LIMIT)
    until("five steps more", lambda: step_of(run) >= stopped + 5)
    cluster.requeue(job)
    until("a later checkpoint", lambda: saved_step(run) > stopped)
    cluster.wait_for(job, rf"resumed at step {saved_step(run)} ", limit=LIMIT)
    until("five steps more", lambda: step_of(run) >= saved_step(run) + 5)
    cluster.run("scancel", job)
    cluster.wait(job, "CANCELLED", limit=LIMIT)
    assert cluster.job(job)["Restarts"] == "2"
    last = max(losses(run))
    run_ranks(1, train, tmp_path / "ranks", recipe, tmp_path / "whole", *settings, f"train.steps={last}")
    assert_same_steps(run, tmp_path / "whole", tolerance=1e-6)
