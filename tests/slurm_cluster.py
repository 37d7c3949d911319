"""A real Slurm cluster on this one host for tests: munged, slurmctld, and a slurmd for each of two nodes."""

import fcntl
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from pace import stretched

from jointfuse.ranks import free_port

NODES = ("nodeA", "nodeB")
CPUS = 16  # of each node, whatever the host has
GPUS = ("null", "zero")  # of each node: devices that every host has
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
SHOWN = 4000  # characters of a job's output in a failure
KEEPER = Path(__file__).with_name("keeper.py")
HOSTS = Path("/etc/hosts")
MARK = "# test cluster of process"

# What is not the default, and why:
#   cred_expire    a requeued job stays pending while its old credential lives: 120 s; 5 is the least that Slurm takes
#   SlurmdTimeout  0: a node is down when a test says so, never because the host is busy
#   KillWait       seconds between TERM and KILL for a job that is cancelled, requeued or out of time
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
PlugStackConfig={folder}/plugstack.conf
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
JobRequeue=1
ReturnToService=2
SlurmdTimeout=0
MessageTimeout=10
KillWait=10
MinJobAge=3600
GresTypes=gpu
{nodes}
PartitionName=all Nodes=ALL Default=YES OverSubscribe=YES
"""


class Cluster:
    """Two nodes that are this host under two names; what a Slurm command needs to find them is in `environment`.

    A job's id is what sbatch prints, for a task of an array ARRAY_TASK.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SRUN"))}
        self.environment = ours | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}{os.pathsep}/usr/sbin",
        }
        self._keepers: dict[str, subprocess.Popen[bytes]] = {}

    # -------------------------------------------------------------------------------------------------------- jobs

    def submit(
        self,
        script: Path | str,
        *arguments: str,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        **options: Any,
    ) -> str:
        """A new job's id. `options` are sbatch's, with `_` for `-` and True for one without a value."""
        given = [
            f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in options.items()
        ]
        return self.sbatch(*given, str(script), *arguments, cwd=cwd, environment=environment)

    def sbatch(self, *words: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None) -> str:
        """A new job's id, from the words of a command line."""
        output = "%A_%a.out" if any(word.startswith("--array") for word in words) else "%j.out"
        command = ["sbatch", "--parsable", f"--output={self.folder / output}", *words]
        return self.run(*command, cwd=cwd or self.folder, environment=environment).strip()

    def run(self, *command: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None) -> str:
        """A Slurm command's standard output; an AssertionError with its words where it fails."""
        done = subprocess.run(
            command,
            env=self.environment | dict(environment or {}),
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=stretched(60),
            check=False,
        )
        assert done.returncode == 0, f"{shlex.join(command)}: {done.stderr or done.stdout}"
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job: JobState, Restarts, ExitCode (status:signal), NodeList, ..."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "--oneliner", "show", "job", job)))

    def state(self, job: str) -> str:
        return self.job(job)["JobState"]

    def output(self, job: str) -> str:
        """What the job has written so far, over all its starts if it appends."""
        path = self.folder / f"{job}.out"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def wait(self, job: str, *states: str, limit: float = 60) -> str:
        """The state of a job once it is one of these, by default any in which a job has ended.

        Raises:
            AssertionError: the job has ended otherwise, or the limit (seconds, at the pace of this machine) has passed;
                with the job's output.
        """
        wanted = set(states) or ENDED
        return self._until(job, lambda: self.state(job), lambda state: state in wanted, f"to be {wanted}", limit)

    def wait_for(self, job: str, pattern: str, limit: float = 60) -> str:
        """The job's output once the regular expression is found in it. Raises as `wait` does."""
        found = re.compile(pattern, flags=re.MULTILINE).search
        return self._until(job, lambda: self.output(job), lambda text: bool(found(text)), f"to say {pattern!r}", limit)

    def _until(
        self, job: str, look: Callable[[], str], good: Callable[[str], bool], expected: str, limit: float
    ) -> str:
        limit = stretched(limit)
        deadline = time.monotonic() + limit
        while True:
            state = self.state(job)  # before the look: what an ended job has written, it has written
            if good(seen := look()):
                return seen
            late = time.monotonic() > deadline
            if late or state in ENDED:
                reason = f"is still {state} after {limit} s" if late else f"has ended as {state}"
                raise AssertionError(f"job {job} was {expected} and {reason}:\n{self.output(job)[-SHOWN:]}")
            time.sleep(0.1)

    def requeue(self, job: str) -> None:
        self.run("scontrol", "requeue", job)

    def signal(self, job: str, name: str) -> None:
        """To the tasks of a running job, not to its batch script: `scancel --signal=NAME`."""
        self.run("scancel", f"--signal={name}", job)

    # ------------------------------------------------------------------------------------------------------- nodes

    def kill_node(self, name: str) -> None:
        """End a node's slurmd and everything that ran there, at once and without a word, and tell Slurm."""
        self._kill(name)
        self.run("scontrol", "update", f"nodename={name}", "state=down", "reason=killed")

    def restart_node(self, name: str) -> None:
        """Start a killed node again and wait until Slurm may use it."""
        self._keep(name, "slurmd", "-D", "-N", name)
        self._wait_for_nodes(name)

    def clear(self) -> None:
        """Cancel all jobs and start the nodes that are down: as if nothing had been."""
        with suppress(AssertionError):  # a job that has only just ended
            self.run("scancel", "--signal=KILL", "--full", "--user=root", "--state=RUNNING")
        self.run("scancel", "--user=root")
        for name in NODES:
            if name not in self._keepers:
                self.restart_node(name)
        self._poll(lambda: not self.run("squeue", "--noheader"), "jobs that do not end")
        self._wait_for_nodes(*NODES)

    def _wait_for_nodes(self, *names: str) -> None:
        def up() -> bool:
            lines = self.run("sinfo", "--noheader", "--Node", "--format=%N %t").splitlines()
            return all(dict(line.split() for line in lines)[name] in ("idle", "mix", "alloc") for name in names)

        self._poll(up, f"{' and '.join(names)} not up")

    def _poll(self, good: Callable[[], bool], otherwise: str, limit: float = 60) -> None:
        limit = stretched(limit)
        deadline = time.monotonic() + limit
        while not good():
            assert time.monotonic() < deadline, f"{otherwise} after {limit} s:\n{self._logs()}"
            time.sleep(0.1)

    def _logs(self) -> str:
        return "\n".join(
            f"{log.name}: {log.read_text(encoding='utf-8', errors='replace')[-SHOWN:]}"
            for log in sorted(self.folder.glob("*.log"))
        )

    # ----------------------------------------------------------------------------------------------------- daemons

    def _keep(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self._keepers[name] = subprocess.Popen(
                [sys.executable, str(KEEPER), *command],
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
            )

    def _kill(self, name: str) -> None:
        keeper = self._keepers.pop(name)
        keeper.terminate()
        keeper.communicate()

    def start(self) -> None:
        (self.folder / "state").mkdir()
        (self.folder / "plugstack.conf").touch()
        nodes = "\n".join(
            f"NodeName={name} NodeAddr=127.0.0.1 Port={free_port()} CPUs={CPUS} Gres=gpu:{len(GPUS)}" for name in NODES
        )
        text = CONFIGURATION.format(
            host=socket.gethostname().partition(".")[0], port=free_port(), folder=self.folder, nodes=nodes
        )
        (self.folder / "slurm.conf").write_text(text, encoding="utf-8")
        devices = "".join(f"Name=gpu File=/dev/{device}\n" for device in GPUS)
        (self.folder / "gres.conf").write_text(devices, encoding="utf-8")
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(64))
        files = [f"--{kind}-file={self.folder / 'munged'}.{kind}" for kind in ("pid", "seed", "log")]
        # --force: it warns of a folder that only root may enter, which is meant.
        socket_file = self.folder / "munge.socket"
        self._keep("munge", "munged", "--foreground", "--force", f"--socket={socket_file}", f"--key-file={key}", *files)
        self._poll(socket_file.exists, "munged does not listen")
        self._keep("controller", "slurmctld", "-D")
        for name in NODES:
            self._keep(name, "slurmd", "-D", "-N", name)
        self._poll(lambda: "UP" in self._ping(), "slurmctld does not answer")
        self._wait_for_nodes(*NODES)

    def _ping(self) -> str:
        with suppress(AssertionError):
            return self.run("scontrol", "ping")
        return ""

    def stop(self) -> None:
        for name in reversed(list(self._keepers)):
            self._kill(name)


@contextmanager
def slurm_cluster() -> Iterator[Cluster]:
    """A cluster for as long as the block lasts; skips the test where there can be none."""
    if not shutil.which("slurmctld", path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin"):
        pytest.skip("Slurm is not installed (Debian: apt install slurm-wlm munge)")
    if os.geteuid() != 0:
        pytest.skip("only root can start a Slurm cluster of its own")
    # Not pytest's folder: the path of a socket has 107 characters at most.
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, _named_nodes():
        cluster = Cluster(Path(folder))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


@contextmanager
def _named_nodes() -> Iterator[None]:
    """The nodes' names as names of this host."""
    _edit_hosts(f"127.0.0.1 {' '.join(NODES)} {MARK} {os.getpid()}\n")
    try:
        yield
    finally:
        _edit_hosts("")


def _edit_hosts(line: str) -> None:
    """Replace our line, and those of processes that died before they could take theirs away."""
    # In place: in a container the file is a mount that cannot be renamed over.
    with HOSTS.open("r+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        lines = file.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines[-1] += "\n"
        kept = [line for line in lines if not (found := re.search(f"{MARK} (\\d+)", line)) or _others(int(found[1]))]
        file.seek(0)
        file.write("".join([*kept, line]))
        file.truncate()


def _others(process: int) -> bool:
    return process != os.getpid() and Path(f"/proc/{process}").exists()
