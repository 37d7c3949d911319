"""Jobs of several ranks, started by the DeepSpeed launcher on every machine they run on, checked before they start."""

import fcntl
import os
import socket
import struct
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from jointfuse.config import Config
from jointfuse.errors import PASSING, USER_ERROR, UserError
from jointfuse.interruption import JOB, POLL, STOPPED, Job, shielded
from jointfuse.ranks import free_port

INTERRUPTED = 130  # exit status after a second Ctrl-C
GET_ADDRESS = 0x8915  # SIOCGIFADDR of Linux


@dataclass(frozen=True)
class Nodes:
    """The machines of a job, as one of them sees them.

    Args:
        number: how many there are.
        rank: which of them this is; 0 <= rank < number.
        master: HOST:PORT at which node 0 is reached by the others; may be left out where it is alone.

    Raises:
        UserError: they do not fit together.
    """

    number: int = 1
    rank: int = 0
    master: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.number:
            raise UserError(f"--node-rank {self.rank}: of {self.number} nodes, one is 0 to {self.number - 1}")
        host, _, port = self.master.rpartition(":")
        if (self.master or self.number > 1) and not (host and port.isdecimal()):
            raise UserError(f"--master {self.master!r}: write HOST:PORT of node 0, where the other nodes reach it")

    @property
    def address(self) -> tuple[str, str]:
        host, _, port = (self.master or f"127.0.0.1:{free_port()}").rpartition(":")
        return host, port

    def environment(self) -> dict[str, str]:
        """Where gloo listens on this machine: at the interface that leads to node 0. Left alone, gloo takes whatever
        the host's name stands for, which Debian makes an address that no other machine can reach."""
        if self.number == 1 or "GLOO_SOCKET_IFNAME" in os.environ:
            return {}
        interface = _interface_towards(self.address[0])
        return {"GLOO_SOCKET_IFNAME": interface} if interface else {}


def _interface_towards(host: str) -> str | None:
    """The name of the network interface that packets to a host leave by; None where that cannot be told (IPv6)."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing
            own = socket.inet_aton(probe.getsockname()[0])
            for _, name in socket.if_nameindex():
                with suppress(OSError):  # an interface without an address
                    answer = fcntl.ioctl(probe, GET_ADDRESS, struct.pack("256s", name.encode()))
                    if answer[20:24] == own:
                        return name
    except OSError:
        pass
    return None


def check_train(config: Config, run: Path, resume: bool, ranks: int) -> None:
    """What can be known to be wrong before any rank starts. Raises UserError.

    Args:
        ranks: of all nodes.
    """
    from jointfuse.data.intact import splits_of
    from jointfuse.data.mixture import open_for_training
    from jointfuse.train.checkpoint import check_resumable
    from jointfuse.train.deepspeed_file import read_deepspeed_file
    from jointfuse.train.engine import check_precision, divide
    from jointfuse.train.hold import check_not_held
    from jointfuse.train.run_folder import DIED, check_run_folder, describe_run, read_status
    from jointfuse.train.start import splits_read
    from jointfuse.train.whole import latest_checkpoint

    check_not_held(run)
    check_run_folder(run, resume)
    divide(config.train, ranks)
    check_precision(read_deepspeed_file(config.train))
    corpus = open_for_training(config.data)
    checkpoint = latest_checkpoint(run) if resume else None
    if resume and read_status(run) == DIED:
        print(describe_run(run), file=sys.stderr)
    if checkpoint:
        check_resumable(checkpoint, config, ranks, corpus)
    splits_of(corpus, splits_read(config, corpus))


def launch_training(
    recipe: str,
    overrides: list[str],
    run: Path,
    resume: bool,
    ranks: int,
    nodes: Nodes = Nodes(),
    brief: bool = False,
) -> int:
    """Train on `ranks` ranks of this machine and as many of each other node. Returns the exit status: 0 finished, 2 a
    user's mistake, 3 stopped when asked to, with a checkpoint; anything else is a fault, 75 one that may pass."""
    from jointfuse.train.run_folder import FINISHED, STOPPED_EARLY, read_status

    options = [
        "--recipe",
        recipe,
        "--run",
        str(run),
        *(["--resume"] if resume else []),
        *(["--brief"] if brief else []),
    ]
    status = launch("jointfuse.train", [*options, *overrides], ranks, nodes, stoppable=True)
    # The launchers' own exit statuses say too little: 0 where the one that watches the ranks was killed, and of a run
    # that stopped whichever rank left first.
    ended = read_status(run)
    if ended == STOPPED_EARLY and status in (0, STOPPED):
        return STOPPED
    if not status and ended != FINISHED:
        print(f"error: {run}: the launcher was killed before the run ended; go on with --resume", file=sys.stderr)
        return 1
    return status


def launch_evaluation(run: Path, split: str, corpus: str | None, overrides: list[str], ranks: int) -> int:
    """Evaluate on `ranks` ranks of this machine. Returns the exit status."""
    options = ["--split", split, *(["--corpus", corpus] if corpus else [])]
    return launch("jointfuse.evaluate", [str(run), *options, *overrides], ranks)


def launch(
    module: str,
    arguments: list[str],
    ranks: int,
    nodes: Nodes = Nodes(),
    stoppable: bool = False,
) -> int:
    """`python -m MODULE ARGUMENTS` as `ranks` ranks of this machine and as many of each other node.

    Args:
        stoppable: its ranks listen (interruption.py): signals that this process receives are theirs.

    Returns:
        The exit status: 0, 2 for a user's mistake, anything else for a fault.
    """
    import torch

    environment = os.environ | nodes.environment()
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    # The launcher looks for ninja and for itself on the PATH, where a virtual environment that is not active is not.
    scripts = Path(sys.executable).parent
    environment["PATH"] = f"{scripts}{os.pathsep}{environment.get('PATH', '')}"
    host, port = nodes.address
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jointfuse-")))
        where = ["--num_gpus", str(ranks)]
        if nodes.number > 1:
            (folder / "hostfile").write_text("".join(f"node{n} slots={ranks}\n" for n in range(nodes.number)))
            where = ["--hostfile", str(folder / "hostfile"), "--no_ssh", "--node_rank", str(nodes.rank)]
        command = [
            *(sys.executable, str(scripts / "deepspeed"), *where, "--master_addr", host, "--master_port", port),
            *("--log_level", "critical", "--module", module, *arguments),
        ]
        if stoppable:
            (folder / "job").mkdir()
            status, interrupted = _watched(command, environment | {JOB: str(folder / "job")}, folder / "job")
            if interrupted:
                return INTERRUPTED
        else:
            status = subprocess.run(command, env=environment, check=False).returncode
    if status not in (0, 1, USER_ERROR, STOPPED, PASSING):  # those ranks have said why
        print(
            f"error: a rank of {module} was killed (exit status {status}); if memory ran out, use more ranks or a "
            f"smaller train.micro_batch",
            file=sys.stderr,
        )
    return status


def _watched(command: list[str], environment: dict[str, str], folder: Path) -> tuple[int, bool]:
    """Exit status of a launcher, and whether it was ended by a second Ctrl-C."""
    with Job(folder) as job:
        with shielded():
            launcher = subprocess.Popen(command, env=environment)
        while True:
            try:
                return launcher.wait(POLL), job.interrupts > 1
            except subprocess.TimeoutExpired:
                job.forward()
