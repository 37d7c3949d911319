"""Real ranks for tests: processes of their own that talk over gloo, watched, and ended together."""

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from jointfuse.ranks import free_port

SHOWN = 4000  # characters of a failing rank's output


def run_ranks(
    world_size: int, work: Callable[..., Any], folder: Path, *arguments: Any, limit: float = 300
) -> list[Any]:
    """`work(*arguments)` in `world_size` processes that form one gloo group; what each returned, in rank order.

    Args:
        work: a function at the top of a module of tests/.
        folder: made for this call; output and results of the ranks lie there.
        limit: seconds until all of them are killed.

    Raises:
        AssertionError: a rank failed or the limit passed, with the end of that rank's output.
    """
    folder.mkdir(parents=True)
    job = folder / "job.pickle"
    job.write_bytes(pickle.dumps((work.__module__, work.__name__, arguments)))
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }
    ranks = []
    for rank in range(world_size):
        with (folder / f"rank{rank}.log").open("wb") as log:
            ranks.append(
                subprocess.Popen(
                    [sys.executable, __file__, str(job)],
                    env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    try:
        _wait(ranks, folder, limit)
    finally:
        for process in ranks:
            end_group(process)
    return [pickle.loads((folder / f"rank{rank}.pickle").read_bytes()) for rank in range(world_size)]


def _wait(ranks: list[subprocess.Popen[bytes]], folder: Path, limit: float) -> None:
    deadline = time.monotonic() + limit
    while True:
        states = [process.poll() for process in ranks]
        failed = next((rank for rank, state in enumerate(states) if state), None)
        assert failed is None, f"rank {failed} ended with status {states[failed]}:\n{_output(folder, failed)}"
        if all(state == 0 for state in states):
            return
        slow = states.index(None)
        assert time.monotonic() < deadline, f"rank {slow} still runs after {limit} s:\n{_output(folder, slow)}"
        time.sleep(0.05)


def _output(folder: Path, rank: int) -> str:
    return (folder / f"rank{rank}.log").read_text(encoding="utf-8", errors="replace")[-SHOWN:]


def end_group(process: subprocess.Popen[Any]) -> None:
    """Kill a process started with start_new_session, and all it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_program(
    command: list[str], limit: float = 240, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """A program with captured output; killed with everything it started when `limit` seconds have passed."""
    with subprocess.Popen(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"} | (environment or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            end_group(process)
            output, errors = process.communicate()
            raise AssertionError(
                f"{command} still runs after {limit} s:\n{output[-SHOWN:]}\n{errors[-SHOWN:]}"
            ) from None
        finally:
            end_group(process)
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def _rank(job: Path) -> None:
    import importlib

    import torch.distributed as dist

    module, name, arguments = pickle.loads(job.read_bytes())
    work = getattr(importlib.import_module(module), name)
    dist.init_process_group("gloo")
    result = work(*arguments)
    dist.barrier()
    dist.destroy_process_group()
    (job.parent / f"rank{os.environ['RANK']}.pickle").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    _rank(Path(sys.argv[1]))
