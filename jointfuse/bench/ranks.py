"""A piece of a benchmark on several processes that form one group."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from jointfuse.files import read_json, write_json
from jointfuse.gpu import choose_kernels
from jointfuse.ranks import leave


def on_ranks(ranks: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(*arguments)`, a function at the top of a module, returns on each rank, in rank order, as JSON.

    Ranks share a CPU's cores evenly, or have a GPU each.
    """
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_rank, (ranks, work, arguments, folder), nprocs=ranks)
        return [read_json(Path(folder) / f"{rank}.json", Any, "run it again") for rank in range(ranks)]


def _rank(rank: int, ranks: int, work: Callable[..., Any], arguments: tuple[Any, ...], folder: str) -> None:
    # DeepSpeed reads these even where the group is made already.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
        choose_kernels()
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    result = work(*arguments)
    write_json(Path(folder) / f"{rank}.json", result)
    leave(0)
