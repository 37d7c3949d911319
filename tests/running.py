"""The real programs while they run: started, watched, ended."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from jointfuse.train.checkpoint import latest_checkpoint

LIMIT = 120  # seconds for what takes a few
PROGRAM = str(Path(sys.executable).parent / "jointfuse")


def processes_of(run: Path) -> list[int]:
    """Of launchers, ranks and decoding workers: whoever has the run on its command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if str(run).encode() in entry.read_bytes() and int(entry.parent.name) != os.getpid():
                found.append(int(entry.parent.name))
    return found


def until(what: str, holds: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.01)


@contextmanager
def started(command: Sequence[str], run: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program that works on a run, in a session of its own; whatever of it is left in the end is killed. What it says
    goes to `output` beside the run."""
    with (run.parent / "output").open("ab") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, start_new_session=True, env=os.environ | environment
        )
    try:
        yield process
    finally:
        for left in processes_of(run):
            with suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)
        process.wait()


def step_of(run: Path) -> int:
    """The last step in the log."""
    with suppress(FileNotFoundError):
        rows = (run / "metrics.jsonl").read_text().splitlines()
        return max((json.loads(row)["step"] for row in rows), default=0)
    return 0


def saved_step(run: Path) -> int:
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    return int(json.loads((checkpoint / "position.json").read_text())["step"])


def losses(run: Path) -> dict[int, float]:
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}


def follows(logged: dict[int, float], of_every_step: np.ndarray, tolerance: float) -> None:
    """Each line of the log holds the mean loss of the steps since the line before."""
    last = 0
    for step, loss in sorted(logged.items()):
        assert loss == pytest.approx(np.mean(of_every_step[last:step]), abs=tolerance, rel=0), step
        last = step
