"""Runs that are told to stop, or lose the process that started them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from distributed import run_ranks
from training_fixtures import DROPOUT, corpus, recipe, train

from jointfuse.train.checkpoint import latest_checkpoint

__all__ = ["corpus", "recipe"]

pytestmark = pytest.mark.required
STEPS = 40
SETTINGS = (f"train.steps={STEPS}", "data.workers=1", *DROPOUT)
LIMIT = 120  # seconds for what takes a few


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
        time.sleep(0.05)


@contextmanager
def started(recipe: Path, run: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """`jointfuse train` on two ranks in a session of its own; whatever of it is left in the end is killed."""
    program = Path(sys.executable).parent / "jointfuse"
    command = [str(program), "train", "--recipe", str(recipe), "--run", str(run), "--ranks", "2", *options, *SETTINGS]
    with (run.parent / "output").open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
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


def test_a_run_that_is_stopped_killed_and_resumed_has_the_losses_of_one_that_never_was(
    recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    output = tmp_path / "output"
    with started(recipe, run) as process:
        until("ten steps", lambda: process.poll() is not None or step_of(run) >= 10)
        for _ in range(2):
            os.kill(process.pid, signal.SIGUSR2)
            time.sleep(0.02)
        assert process.wait(LIMIT) == 3, output.read_text()
        assert processes_of(run) == []
        stopped = saved_step(run)
        assert 10 <= stopped < STEPS
        assert f"stopped at step {stopped} when asked to" in output.read_text()
        assert (run / "status").read_text() == "stopped\n"
    # The process that a user sees is killed: everything that it had started ends with it.
    with started(recipe, run, "--resume") as process:
        until("it goes on", lambda: process.poll() is not None or "resumed at step" in output.read_text())
        until("some steps more", lambda: process.poll() is not None or step_of(run) > stopped)
        os.kill(process.pid, signal.SIGKILL)
        until("nothing is left", lambda: processes_of(run) == [])
    with started(recipe, run, "--resume") as process:
        assert process.wait(LIMIT) == 0, output.read_text()
    assert (run / "status").read_text() == "finished\n"
    whole = run_ranks(2, train, tmp_path / "ranks", recipe, tmp_path / "whole", *SETTINGS)[0]
    rows = {row["step"]: row["loss"] for row in whole.rows if row["kind"] == "train"}
    found = losses(run)
    assert set(found) >= {10, 20, 30, 40}
    # Logged every ten steps and where a run stopped: means since the line before.
    means = {}
    last = 0
    for step in sorted(found):
        means[step] = np.mean([rows[one] for one in range(last + 1, step + 1)])
        last = step
    np.testing.assert_allclose([found[step] for step in means], list(means.values()), rtol=0, atol=1e-6)
