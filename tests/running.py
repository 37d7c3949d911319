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
from typing import Any

import numpy as np
import pytest
from pace import stretched

from jointfuse.train.whole import latest_checkpoint

LIMIT = 300  # seconds for what takes a few, at the pace of this machine
RECORDED = "train.record_batches=true"
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
    end = time.monotonic() + stretched(LIMIT)
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
    found = [(row["step"], row["loss"]) for row in rows if row["kind"] == "train"]
    assert [step for step, _ in found] == sorted({step for step, _ in found})
    return dict(found)


def batches(run: Path) -> dict[int, list[tuple[int, bool]]]:
    """With train.record_batches: the ids of each step's global batch in order, and whether they count. Steps that were
    trained twice had the same ones."""
    held: dict[tuple[int, int], dict[int, Any]] = {}
    for file in (run / "batches").iterdir():
        rank = int(file.stem.removeprefix("rank-"))
        for row in map(json.loads, file.read_text().splitlines()):
            part = np.stack([row["ids"], row["valid"]])  # (2, accumulation, micro-batch)
            before = held.setdefault((row["step"], row["ranks"]), {}).setdefault(rank, part)
            assert np.array_equal(before, part), row["step"]
    found: dict[int, list[tuple[int, bool]]] = {}
    for (step, ranks), parts in sorted(held.items()):
        if len(parts) < ranks:
            continue  # a step in which some rank was killed
        ids, valid = np.stack([parts[rank] for rank in range(ranks)], axis=-1).reshape(2, -1)
        batch = list(zip(ids.tolist(), valid.astype(bool).tolist(), strict=True))
        assert found.setdefault(step, batch) == batch, step
    return found


def assert_same_steps(run: Path, whole: Path, tolerance: float) -> None:
    """A run has trained on the batches of another that was never interrupted, every id in its place, and every step had
    that one's loss."""
    expected, expected_batches = losses(whole), batches(whole)
    assert list(expected) == list(expected_batches) == list(range(1, len(expected) + 1))
    assert losses(run) == pytest.approx(expected, abs=tolerance, rel=0)
    found = batches(run)
    for step, batch in expected_batches.items():
        assert found[step] == batch, step
