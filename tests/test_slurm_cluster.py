"""The cluster of the Slurm tests does what one of several machines would do."""

import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from slurm_cluster import Cluster

pytestmark = pytest.mark.required

HEAD = "#!/bin/bash\n#SBATCH --ntasks-per-node=1 --open-mode=append --requeue\n"
# Says where it runs and which start this is, then waits for a signal.
WAITS = """
srun bash -c 'trap "echo TERM on \\$SLURMD_NODENAME; exit 7" TERM
    echo "start ${SLURM_RESTART_COUNT:-0} on $SLURMD_NODENAME"; while true; do sleep 0.1; done'
echo "srun ended with $?"
"""


def script(folder: Path, body: str) -> Path:
    path = folder / "job.sh"
    path.write_text(HEAD + body, encoding="utf-8")
    return path


def test_tasks_of_a_job_run_on_both_nodes_by_names_that_resolve(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(
        script(tmp_path, "srun bash -c 'echo $SLURM_NODEID $SLURMD_NODENAME $(getent hosts $SLURMD_NODENAME)'\n"),
        nodes=2,
    )
    cluster.wait(job, "COMPLETED")
    lines = sorted(line.split() for line in cluster.output(job).splitlines())
    assert [line[:3] for line in lines] == [["0", "nodeA", "127.0.0.1"], ["1", "nodeB", "127.0.0.1"]]


def test_a_signal_reaches_the_tasks_and_a_requeued_job_runs_again(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(script(tmp_path, WAITS), nodes=2)
    cluster.wait_for(job, "start 0 on nodeA")
    cluster.wait_for(job, "start 0 on nodeB")
    cluster.requeue(job)
    cluster.wait_for(job, "TERM on nodeA")
    cluster.wait_for(job, "start 1 on nodeA")
    cluster.wait_for(job, "start 1 on nodeB")
    cluster.signal(job, "TERM")
    cluster.wait(job, "COMPLETED")
    text = cluster.output(job)
    assert text.count("TERM on nodeA") == text.count("TERM on nodeB") == 2
    assert text.splitlines()[-1] == "srun ended with 7"
    assert cluster.job(job)["Restarts"] == "1"


def test_the_job_of_a_killed_node_starts_again_on_the_other_and_nothing_of_the_node_is_left(
    cluster: Cluster, tmp_path: Path
) -> None:
    job = cluster.submit(script(tmp_path, "echo process $$\n" + WAITS))
    process = cluster.wait_for(job, "start 0 on nodeA").split()[1]
    assert Path(f"/proc/{process}").exists()
    cluster.kill_node("nodeA")
    assert not Path(f"/proc/{process}").exists()
    cluster.wait_for(job, "start 1 on nodeB")
    cluster.restart_node("nodeA")
    assert cluster.job(job)["NodeList"] == "nodeB"


STARTS_ANOTHER = """
import time
from slurm_cluster import slurm_cluster

with slurm_cluster() as cluster:
    job = cluster.submit("job.sh")
    cluster.wait_for(job, "started")
    print(cluster.folder, flush=True)
    time.sleep(600)
"""


def processes_of(folder: str) -> set[int]:
    found = set()
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"SLURM_CONF={folder}/" in environment.read_text(errors="replace"):
                found.add(int(environment.parent.name))
    return found


def test_a_cluster_ends_with_the_tests_even_where_those_are_killed(cluster: Cluster, tmp_path: Path) -> None:
    program = STARTS_ANOTHER.replace("job.sh", str(script(tmp_path, "echo started; sleep 600\n")))
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
        stdout=subprocess.PIPE,
        text=True,
    ) as tests:
        assert tests.stdout is not None
        folder = tests.stdout.readline().strip()
        left = processes_of(folder)
        tests.kill()
    assert len(left) > 5, "daemons and a job"
    deadline = time.monotonic() + 30
    while processes_of(folder):
        assert time.monotonic() < deadline, f"{left} still run"
        time.sleep(0.1)
    shutil.rmtree(folder)
