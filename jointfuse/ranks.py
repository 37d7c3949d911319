"""How a process becomes one of several ranks, and how it leaves them."""

import os
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn

from jointfuse.errors import ReadableError, line_and_status
from jointfuse.interruption import FAULT, STOPPED

MARGIN = 600.0  # seconds: weights are loaded and extensions compiled before a first step, and the watchdog is to speak
# before a collective gives up, since it says where
LOST = 15  # seconds


def rank_main(work: Callable[[], bool]) -> None:
    """Do `work`, which calls `join`, and leave the other ranks.

    A UserError ends the process with one line and exit status 2, a disk or server that was away with 75, work that
    answers False (it was stopped) with 3.
    """
    rank = int(os.environ.get("RANK", "0"))
    try:
        done = work()
    except (ReadableError, OSError) as error:
        line, status = line_and_status(error)
        if rank:
            # Mostly every rank finds the same fault: rank 0 says it, and its exit ends the others before they do.
            time.sleep(5)
        print(f"error: {'' if not rank else f'rank {rank}: '}{line}", file=sys.stderr, flush=True)
        # Without tearing down: the other ranks may be inside a collective that will not end.
        os._exit(status)
    except RuntimeError as error:
        if not _means_a_lost_peer(error):
            raise
        # The rank that failed has said why, and on its machine the launcher ends this one.
        time.sleep(LOST)
        print(
            f"error: rank {rank}: another rank has gone or hangs ({str(error).splitlines()[0]}); its own last line "
            "says why, and --resume goes on from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(FAULT)
    leave(0 if done else STOPPED)


def _means_a_lost_peer(error: RuntimeError) -> bool:
    import torch

    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def join(longest_step: float) -> None:
    """Become one of the ranks that the environment names, or the only one.

    Args:
        longest_step: seconds between two collectives, at the most; with a margin, all of them wait for so long.
    """
    import torch
    from torch.distributed import distributed_c10d

    from jointfuse.gpu import choose_kernels

    alone = "RANK" not in os.environ
    if alone:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ.setdefault("MASTER_PORT", str(free_port()))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        choose_kernels()
    elif "OMP_NUM_THREADS" not in os.environ:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or os.environ["WORLD_SIZE"])
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks_here))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    timeout = timedelta(seconds=longest_step + MARGIN)
    torch.distributed.init_process_group(backend, timeout=timeout)
    # Of the groups that are formed later, DeepSpeed's among them, which would have torch's own.
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout


def leave(status: int) -> NoReturn:
    """Part from the other ranks and end this process at once.

    Were the interpreter taken down, a thread of gloo that lets go of its last tensor meanwhile would abort the process;
    and nobody waits for decoding workers that still run.
    """
    import torch

    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
