"""Whose a run is: one training at a time works on it, and a run whose training died is told from one that goes on."""

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from jointfuse.errors import PassingFault
from jointfuse.files import read_json, write_json
from jointfuse.lock import Lock

LOCK, HOLDER = "lock", "holder.json"
PROBES = 2.0  # seconds in which somebody who only looks lets go of the lock again
POLL = 0.1  # seconds


class Holder(BaseModel):
    """The process that trains a run, or did so last."""

    host: str
    pid: int

    def __str__(self) -> str:
        return f"on {self.host} as process {self.pid}"


@dataclass
class Hold:
    """A run, to be held by rank 0 until its process ends, however it ends; see lock.py for what that promises.

    Args:
        run: folder of the run, which need not be there yet.
    """

    run: Path
    lock: Lock | None = None

    def take(self) -> None:
        """Make the folder where it is missing, and hold it. Raises PassingFault where another process does."""
        if self.lock:
            return
        self.run.mkdir(parents=True, exist_ok=True)
        lock = Lock(self.run / LOCK)
        end = time.monotonic() + PROBES
        while not lock.take():
            if time.monotonic() > end:
                raise PassingFault(_taken(self.run))
            time.sleep(POLL)
        lock.keep_from_forks()
        self.lock = lock
        write_json(self.run / HOLDER, Holder(host=socket.gethostname(), pid=os.getpid()).model_dump())

    def release(self) -> None:
        if self.lock:
            self.lock.release()
            self.lock = None


def check_not_held(run: Path) -> None:
    """Raises PassingFault where a process trains this run."""
    if is_held(run):
        raise PassingFault(_taken(run))


def is_held(run: Path) -> bool:
    """Whether a process trains this run now. Of no use to that process itself."""
    if not (run / LOCK).exists():
        return False
    lock = Lock(run / LOCK)
    try:
        return not lock.take(shared=True)  # so that two who look do not see each other
    finally:
        lock.close()


def holder_of(run: Path) -> Holder | None:
    """The process that trains a run, or the last that did."""
    if not (run / HOLDER).exists():
        return None
    return read_json(run / HOLDER, Holder, "it says who trains the run; delete it once nobody does")


def _taken(run: Path) -> str:
    holder = holder_of(run)
    return (
        f"{run}: a training works on this run already{f', {holder}' if holder else ''}; wait for it, stop it, or "
        "choose another folder"
    )
