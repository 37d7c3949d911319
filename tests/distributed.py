"""Real ranks for tests: processes of their own that talk over gloo, watched, and ended together."""

import atexit
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

from pace import stretched

from jointfuse.ranks import free_port

SHOWN = 4000  # characters of a failing rank's output
KEPT = 2  # groups alive beside each other


def run_ranks(
    world_size: int, work: Callable[..., Any], folder: Path, *arguments: Any, limit: float = 300
) -> list[Any]:
    """`work(*arguments)` in `world_size` processes that form one gloo group; what each returned, in rank order.

    The processes stay for the next call with the same `world_size`: to start one is to import for ten seconds. What a
    library changes for a whole process stays too, such as torch's linear function after a first use of ZeRO-3.

    Args:
        work: a function at the top of a module of tests/.
        folder: made for this call; output and results of the ranks lie there.
        limit: seconds until all of them are killed, at the pace of this machine (pace.py).

    Raises:
        AssertionError: a rank failed or the limit passed, with the end of that rank's output.
    """
    folder.mkdir(parents=True)
    ranks = _alive.pop(world_size, None) or _Ranks(world_size)
    while len(_alive) >= KEPT:
        end_ranks(next(iter(_alive)))
    _alive[world_size] = ranks
    try:
        return ranks.run((work.__module__, work.__name__, arguments), folder, limit)
    except BaseException:
        end_ranks(world_size)
        raise


class _Ranks:
    """Processes that form one gloo group and wait for work on their standard input."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        environment = os.environ | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
        }
        self.processes = [
            subprocess.Popen(
                [sys.executable, __file__],
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                start_new_session=True,
            )
            for rank in range(world_size)
        ]

    def run(self, job: tuple[str, str, tuple[Any, ...]], folder: Path, limit: float) -> list[Any]:
        (folder / "job.pickle").write_bytes(pickle.dumps(job))
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(f"{folder}\n".encode())
            process.stdin.flush()
        answers = [folder / f"rank{rank}.pickle" for rank in range(self.world_size)]
        limit = stretched(limit)
        deadline = time.monotonic() + limit
        while not all(answer.exists() for answer in answers):
            for rank, process in enumerate(self.processes):
                status = process.poll()
                assert status is None, f"rank {rank} ended with status {status}:\n{_output(folder, rank)}"
            for rank, answer in enumerate(answers):
                late = time.monotonic() > deadline and not answer.exists()
                assert not late, f"rank {rank} still works after {limit} s:\n{_output(folder, rank)}"
            time.sleep(0.05)
        return [pickle.loads(answer.read_bytes()) for answer in answers]


_alive: dict[int, _Ranks] = {}  # by world size, the one used last at the end


def end_ranks(*world_sizes: int) -> None:
    """End the processes of these groups, or of all."""
    for world_size in world_sizes or tuple(_alive):
        if world_size in _alive:
            for process in _alive.pop(world_size).processes:
                end_group(process)


atexit.register(end_ranks)


def _output(folder: Path, rank: int) -> str:
    log = folder / f"rank{rank}.log"
    return log.read_text(encoding="utf-8", errors="replace")[-SHOWN:] if log.exists() else "(it never began)"


def end_group(process: subprocess.Popen[Any]) -> None:
    """Kill a process started with start_new_session, and all it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_program(
    command: list[str], limit: float = 240, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """A program with captured output; killed with everything it started when `limit` seconds have passed at the pace of
    this machine."""
    limit = stretched(limit)
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


def _rank() -> None:
    """One rank: a folder a line comes in, its job.pickle is done, its rankN.pickle is written."""
    import importlib

    import torch.distributed as dist

    rank = os.environ["RANK"]
    dist.init_process_group("gloo")
    for line in sys.stdin:
        folder = Path(line.rstrip("\n"))
        log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        module, name, arguments = pickle.loads((folder / "job.pickle").read_bytes())
        result = getattr(importlib.import_module(module), name)(*arguments)
        dist.barrier()
        partial = folder / f".rank{rank}.partial"
        partial.write_bytes(pickle.dumps(result))
        partial.rename(folder / f"rank{rank}.pickle")
        sys.stdout.flush()


if __name__ == "__main__":
    _rank()
