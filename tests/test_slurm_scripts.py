"""The scripts of slurm/ on a cluster of two nodes, with a `jointfuse` that only says how it was called.

Its exit statuses are the real one's: 0 finished, 2 a user's mistake, 3 stopped on a signal with a checkpoint, else a
fault, 75 one that may pass. Jobs that wait for Slurm are submitted together: a second start comes six seconds after
the first one's end.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from pace import stretched
from slurm_cluster import Cluster
from test_readme import commands

from jointfuse.data.shards import Corpus

pytestmark = pytest.mark.required

PROJECT = Path(__file__).resolve().parents[1]
TRAIN = PROJECT / "slurm" / "train.sbatch"
SWEEP = PROJECT / "slurm" / "sweep.sbatch"
# ENDS holds how each start ends, one after the other: an exit status, or `signal` to wait for one and end with 3.
FAKE = r"""#!/bin/bash
start=${SLURM_RESTART_COUNT:-0}
echo "$start $SLURMD_NODENAME [$CUDA_VISIBLE_DEVICES]: $*"
[ "$1" = doctor ] && exit "${DOCTOR:-0}"
[[ "$*" =~ --run\ ([^ ]*) ]] && mkdir -p "${BASH_REMATCH[1]}" && touch "${BASH_REMATCH[1]}/config.yaml"
read -ra ends <<<"$ENDS"
if [ "${ends[start]}" = signal ]; then
    for name in USR2 TERM; do trap "echo $start $SLURMD_NODENAME: stopped by $name; exit 3" $name; done
    echo "$start $SLURMD_NODENAME: ready"
    while true; do sleep 0.1; done # killed by the signal too, perhaps first
fi
exit "${ends[start]}"
"""


class Desk:
    """A project folder with the scripts, and a fake `jointfuse` in front of the real one. Runs lie in `runs`."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self.runs = folder / "runs"
        for name in ("slurm", "tools"):
            (folder / name).symlink_to(PROJECT / name)
        fake = folder / "bin" / "jointfuse"
        fake.parent.mkdir()
        fake.write_text(FAKE, encoding="utf-8")
        fake.chmod(0o755)
        self.path = os.pathsep.join([str(fake.parent), str(Path(sys.executable).parent), cluster.environment["PATH"]])

    def sbatch(self, *words: str, ends: str, doctor: int = 0, faults: int = 3) -> str:
        environment = {"PATH": self.path, "ENDS": ends, "DOCTOR": str(doctor), "MOST_FAULTS": str(faults)}
        return self.cluster.sbatch(*words, cwd=self.folder, environment=environment)

    def train(self, name: str, *options: str, settings: Sequence[str] = (), **fake: Any) -> str:
        """A training on both nodes, beside other jobs unless the options say otherwise."""
        options = options or ("--oversubscribe",)
        arguments = ["--recipe", "demo", "--run", f"runs/{name}", *settings]
        return self.sbatch("--nodes=2", *options, "slurm/train.sbatch", *arguments, **fake)

    def calls(self, job: str, command: str = "train") -> list[str]:
        """How `jointfuse COMMAND` was called, as "START NODE [GPUS]: ARGUMENTS", sorted."""
        lines = self.cluster.output(job).splitlines()
        called = re.compile(rf"(\d+ node\w \[.*?\]: ){command} (.*)")
        return sorted(found[1] + found[2] for line in lines if (found := called.fullmatch(line)))


@pytest.fixture(scope="module")
def desk(running_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    yield Desk(running_cluster, tmp_path_factory.mktemp("desk"))
    running_cluster.clear()


@pytest.fixture(scope="module")
def jobs(desk: Desk) -> dict[str, str]:
    """Name -> job. All run beside each other; those that end with a signal wait for their test."""
    wanted: dict[str, dict[str, Any]] = {
        "out of time": {"ends": "signal 0"},
        "stopped": {"ends": "signal signal 0", "faults": 0, "settings": ["data.corpus=corpora/mine"]},
        "faulty": {"ends": "75 139 7 0", "faults": 2},
        "faulty between stops": {"ends": "1 3 1 0", "faults": 1},
        "mistaken": {"ends": "2 0"},
        "on bad nodes": {"ends": "0", "doctor": 2},
        "cancelled": {"ends": "signal 0"},
    }
    started = {}
    for name, fake in wanted.items():
        started[name] = desk.train(name.replace(" ", "-"), **fake)
        # slurmd of Slurm 22.05 can crash when many steps come to it in the same millisecond.
        desk.cluster.wait_for(started[name], "0 node")
    for node in "AB":
        desk.cluster.wait_for(started["out of time"], f"0 node{node}: ready")
    # Less than the 120 seconds before which it is to be warned: the warning comes when Slurm looks next.
    desk.cluster.run("scontrol", "update", f"jobid={started['out of time']}", "timelimit=2")
    return started


def test_a_mistake_ends_a_job_at_once(desk: Desk, jobs: dict[str, str]) -> None:
    for name, trained in (("mistaken", 2), ("on bad nodes", 0)):
        desk.cluster.wait(jobs[name], "FAILED")
        job = desk.cluster.job(jobs[name])
        assert (job["ExitCode"], job["Restarts"]) == ("2:0", "0")
        assert len(desk.calls(jobs[name], "doctor")) == 2
        assert len(desk.calls(jobs[name])) == trained
    assert not list(desk.runs.glob("mistaken.*"))


def test_a_stopped_job_starts_again_with_resume_until_it_has_finished(desk: Desk, jobs: dict[str, str]) -> None:
    job = jobs["stopped"]
    for node in "AB":
        desk.cluster.wait_for(job, f"0 node{node}: ready")
    desk.cluster.signal(job, "USR2")
    for node in "AB":
        desk.cluster.wait_for(job, f"0 node{node}: stopped by USR2")
        desk.cluster.wait_for(job, f"1 node{node}: ready")
    desk.cluster.requeue(job)  # as preemption does
    desk.cluster.wait(job, "COMPLETED")
    assert desk.cluster.job(job)["Restarts"] == "2"
    for node in "AB":
        assert f"1 node{node}: stopped by TERM" in desk.cluster.output(job)
    resumed = [line.split()[0] for line in desk.calls(job) if " --resume " in line]
    assert resumed == ["1", "1", "2", "2"]
    assert all(line.endswith(" --recipe demo --run runs/stopped data.corpus=corpora/mine") for line in desk.calls(job))
    masters = {re.search(r"--master (\S+)", line)[1] for line in desk.calls(job)}
    assert len(masters) == 3, "a port of its own for every start: the last one's may still be taken"
    assert sorted(path.name for path in desk.runs.glob("stopped*")) == ["stopped"]


def test_a_cancelled_job_does_not_come_back_though_it_could_save(desk: Desk, jobs: dict[str, str]) -> None:
    job = jobs["cancelled"]
    for node in "AB":
        desk.cluster.wait_for(job, f"0 node{node}: ready")
    desk.cluster.run("scancel", job)
    desk.cluster.wait(job, "CANCELLED")
    for node in "AB":
        assert f"0 node{node}: stopped by TERM" in desk.cluster.output(job)
    assert desk.cluster.job(job)["Restarts"] == "0"


def test_faults_in_a_row_are_bounded_and_the_last_ones_status_is_the_jobs(desk: Desk, jobs: dict[str, str]) -> None:
    job = jobs["faulty"]
    desk.cluster.wait(job, "FAILED")
    assert desk.cluster.job(job)["Restarts"] == "2"
    assert desk.cluster.job(job)["ExitCode"] == "7:0"
    assert desk.cluster.output(job).endswith("error: runs/faulty: given up with status 7, faults in a row: 3\n")
    desk.cluster.wait(jobs["faulty between stops"], "COMPLETED")
    assert desk.cluster.job(jobs["faulty between stops"])["Restarts"] == "3"


def test_every_node_is_called_once_with_its_rank_its_gpus_and_the_same_master(desk: Desk) -> None:
    job = desk.train("whole", "--exclusive", ends="0", settings=["data.labels={a: b}"])
    fewer = desk.sbatch(
        *("--nodes=1-2", "--oversubscribe", "slurm/train.sbatch", "--run=runs/fewer", "--ranks=3"), ends="0"
    )
    desk.cluster.wait(job, "COMPLETED")
    port = 15000 + 11 * int(job)
    place = f"--run runs/whole --ranks 2 --nodes 2 --master nodeA:{port}"
    heads = ["0 nodeA [0,1]: --node-rank 0", "0 nodeB [0,1]: --node-rank 1"]
    assert desk.calls(job, "doctor") == [f"{head} {place}" for head in heads]
    assert desk.calls(job) == [f"{head} {place} --recipe demo --run runs/whole data.labels={{a: b}}" for head in heads]
    desk.cluster.wait(fewer, "COMPLETED")
    calls = desk.calls(fewer)
    assert 1 <= len(calls) <= 2
    assert all(f" --run runs/fewer --ranks 3 --nodes {len(calls)} --master " in line for line in calls)


def write_table(folder: Path, name: str) -> None:
    rows = ["text,emotion,audio,split"]
    for number, split in enumerate(("train", "train", "dev", "test")):
        soundfile.write(folder / f"{number}.wav", np.sin(np.arange(4000) / (5 + number)), 16_000)
        rows.append(f"hello {number},{('joy', 'fear')[number % 2]},{number}.wav,{split}")
    (folder / f"{name}.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")


def test_the_commands_of_the_readme_do_what_it_says(desk: Desk) -> None:
    write_table(desk.folder, "one")
    write_table(desk.folder, "the other")
    (desk.folder / "corpora.txt").write_text(
        "table one.csv --out corpora/one\ntable 'the other.csv' --out 'corpora/the other'\n", encoding="utf-8"
    )
    train, sweep, build = (
        desk.sbatch(*shlex.split(command)[1:], ends="3 0") for command in commands() if command.startswith("sbatch")
    )
    desk.cluster.wait(train, "COMPLETED")
    assert len(desk.calls(train)) == 4
    assert all(
        "--nodes 2 " in line and line.endswith("--recipe demo --run runs/cluster data.corpus=corpora/demo")
        for line in desk.calls(train)
    )

    for task, name in enumerate(f"{recipe}-seed{seed}" for recipe in ("demo", "small") for seed in range(3)):
        job = f"{sweep}_{task}"
        desk.cluster.wait(job, "COMPLETED")
        assert desk.cluster.job(job)["Restarts"] == "1", "a task that starts again leaves the others alone"
        recipe, seed = name.split("-seed")
        asked = f"--recipe {recipe} --run runs/sweep/{name} train.seed={seed} data.corpus=corpora/mine"
        first, second = desk.calls(job)
        assert first.endswith(f" {asked}")
        assert second.endswith(f" --resume {asked}")

    for task, name in enumerate(("one", "the other"), start=1):
        desk.cluster.wait(f"{build}_{task}", "COMPLETED")
        assert len(Corpus.open(desk.folder / "corpora" / name).split("train")) == 2


def test_a_job_is_stopped_before_its_time_is_up_and_goes_on(desk: Desk, jobs: dict[str, str]) -> None:
    job = jobs["out of time"]
    desk.cluster.wait(job, "COMPLETED", limit=120)
    assert desk.cluster.job(job)["Restarts"] == "1"
    for node in "AB":
        assert f"0 node{node}: stopped by USR2" in desk.cluster.output(job)


def test_a_lost_node_is_a_fault_like_any_other(desk: Desk) -> None:
    job = desk.train("lost", ends="signal 0", faults=0)
    desk.cluster.wait_for(job, "0 nodeA: ready")
    desk.cluster.kill_node("nodeA")  # with the batch script
    desk.cluster.restart_node("nodeA")
    desk.cluster.wait(job, "FAILED")
    assert desk.cluster.job(job)["Restarts"] == "1"
    assert desk.cluster.output(job).endswith(
        "error: runs/lost: given up, faults in a row: 1, the last without a word\n"
    )
    assert len(desk.calls(job, "doctor")) == 2


@pytest.mark.parametrize(
    ("script", "arguments", "says"),
    [
        ("train", "--recipe demo", r"--run is missing; .*"),
        ("sweep", "--seeds 0,1 --out runs/sweep", r"sweep\.sbatch wants --recipes .*"),
        ("sweep", "--recipes demo,small --seeds 0,1 --out runs/sweep", r"these are 4 runs; .* --array 0-3"),
        ("build_shards", "short.txt", r"short\.txt has no line 3; .* --array 1-2"),
        ("build_shards", "", r"build_shards\.sbatch: a list of corpora is wanted .*"),
        ("build_shards", "none.txt", r"none\.txt: a list of corpora is wanted .*"),
    ],
)
def test_a_wrong_submission_is_one_line(script: str, arguments: str, says: str, desk: Desk) -> None:
    (desk.folder / "short.txt").write_text("spoken --out a\nspoken --out b\n", encoding="utf-8")
    environment = {"PATH": desk.path, "SLURM_ARRAY_TASK_ID": "4" if script == "sweep" else "3"}
    command = ["bash", f"slurm/{script}.sbatch", *arguments.split()]
    done = subprocess.run(
        command, cwd=desk.folder, env=environment, capture_output=True, text=True, timeout=stretched(60), check=False
    )
    assert done.returncode == 2
    assert re.fullmatch(f"error: {says}\n", done.stderr), done.stderr
    assert not done.stdout
