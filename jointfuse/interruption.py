"""Being told to stop: by USR2 or TERM, as Slurm does before it takes a node away, or by Ctrl-C.

The signals are for the ranks, which save and leave at the next step, and for nobody between: DeepSpeed's launchers
would end and leave their ranks behind. So all of them are blocked wherever `shielded` starts processes, which the
processes inherit, decoding workers included; a rank waits for them in a thread.
"""

import ctypes
import fcntl
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SIGNALS = {signal.SIGUSR2, signal.SIGTERM, signal.SIGINT}
JOB = "JOINTFUSE_JOB"  # environment variable: the folder of a Job
POLL = 0.5  # seconds
FAULT, STOPPED = 1, 3  # exit statuses
PR_SET_PDEATHSIG = 1


def end_when_asked() -> None:
    """Before there are ranks: this process ends with exit status 3, and nothing is lost."""
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(STOPPED))


@contextmanager
def shielded() -> Iterator[None]:
    """Processes started inside never see the signals, nor do theirs, unless they ask for them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def listen() -> threading.Event:
    """Become a rank that stops when asked to: what is returned is set then.

    To be called before any other thread is started. The rank ends at once where its launcher or whoever started that
    dies, or where the launcher ends it because another rank has failed.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    launcher, job = os.getppid(), os.environ.get(JOB)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    asked = threading.Event()

    def wait() -> None:
        while True:
            received = signal.sigwaitinfo(SIGNALS)
            if received.si_signo == signal.SIGTERM and received.si_pid == launcher:
                os._exit(FAULT)
            asked.set()

    def watch(starter: Path) -> None:
        with starter.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH)  # had only by one who survives it
        os._exit(FAULT)

    threading.Thread(target=wait, daemon=True).start()
    if job:
        threading.Thread(target=watch, args=[Path(job) / "starter"], daemon=True).start()
        (Path(job) / "ranks" / str(os.getpid())).touch()
    return asked


class Job:
    """The ranks of this machine, for the process that starts them: signals are handed on, a second Ctrl-C kills.

    Args:
        folder: an empty one, in which each rank leaves its process number and sees whether this process lives.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked, self.interrupts = False, 0
        self._told: set[int] = set()

    def __enter__(self) -> "Job":
        (self.folder / "ranks").mkdir()
        self._lock = (self.folder / "starter").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._lock.close()

    def _receive(self, number: int, frame: object) -> None:
        self.asked = True
        if number == signal.SIGINT:
            self.interrupts += 1
            if self.interrupts == 1:
                print("\nsaving after this step; Ctrl-C again ends at once", file=sys.stderr, flush=True)

    def forward(self) -> None:
        for rank in (int(path.name) for path in (self.folder / "ranks").iterdir()):
            with suppress(ProcessLookupError):
                if self.interrupts > 1:
                    os.kill(rank, signal.SIGKILL)
                elif self.asked and rank not in self._told:
                    self._told.add(rank)
                    os.kill(rank, signal.SIGUSR2)
