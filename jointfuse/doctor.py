"""What a job needs of the machines it runs on, looked at before it starts: versions, devices, connections, disk."""

import os
import shutil
import socket
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jointfuse.errors import UserError
from jointfuse.launch import Nodes

PACKAGES = ("jointfuse", "torch", "deepspeed", "transformers", "timm", "numpy")
WAIT = timedelta(seconds=60)  # for the other nodes
LEAST_FREE = 2**30  # bytes


@dataclass(frozen=True)
class Node:
    """What one machine says of itself."""

    name: str
    python: str
    packages: dict[str, str]
    devices: list[str]  # GPUs; none: it trains on its CPU
    cores: int
    bf16: bool  # whether its CPU has instructions for it
    free_bytes: int  # where the run goes
    sees_folder: bool  # what node 0 has put there


def examine(run: Path, ranks: int, nodes: Nodes, console: Console) -> list[Node]:
    """Look at this machine and at the others of a job; every node calls it. Node 0 prints what was found.

    Args:
        run: folder of the run, which all nodes must see.
        ranks: a node.

    Returns:
        All nodes, in order.

    Raises:
        UserError: a node that cannot be reached or is not as the others, too few GPUs, no room on the disk.
    """
    import torch

    from jointfuse.train.run_folder import describe_run

    folder = _folder(run)
    if nodes.number == 1:
        found = [_this(folder, sees_folder=True)]
        _compare(found, ranks, folder)
    else:
        os.environ |= nodes.environment()
        try:
            torch.distributed.init_process_group(
                "gloo", f"tcp://{nodes.master}", timeout=WAIT, world_size=nodes.number, rank=nodes.rank
            )
            found = _together(folder, nodes)
            _compare(found, ranks, folder)
            if found[0].devices:
                group = torch.distributed.new_group(backend="nccl", timeout=WAIT)
                torch.distributed.all_reduce(torch.ones(1, device="cuda"), group=group)
                torch.cuda.synchronize()
            torch.distributed.destroy_process_group()
        except UserError:
            raise
        except (RuntimeError, ValueError) as error:  # what torch.distributed raises
            raise UserError(
                f"node {nodes.rank} ({socket.gethostname()}): the {nodes.number} nodes did not meet at {nodes.master} "
                f"within {WAIT.seconds} s ({str(error).splitlines()[0]}); is that an address of node 0, is its port "
                "open, and do GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network between the nodes?"
            ) from error
    if nodes.rank == 0:
        versions = ", ".join(f"{package} {number}" for package, number in found[0].packages.items())
        console.print(f"Python {found[0].python}, {versions}", soft_wrap=True, highlight=False)
        console.print(_table(found))
        if described := describe_run(run):
            console.print(described, soft_wrap=True, highlight=False, markup=False)
        slow = [node.name for node in found if not node.devices and not node.bf16]
        if slow:
            console.print(
                f"{', '.join(slow)}: no GPU, and a CPU without instructions for bf16, some twenty times slower "
                "there than float32: choose zero2 rather than zero2_bf16, and likewise",
                soft_wrap=True,
                highlight=False,
            )
    return found


def _folder(run: Path) -> Path:
    """The nearest folder of a run's path that is there."""
    folder = run.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


def _together(folder: Path, nodes: Nodes) -> list[Node]:
    import torch.distributed as dist

    name = [f".jointfuse-{os.getpid()}-{socket.gethostname()}"]
    dist.broadcast_object_list(name)
    mark = folder / name[0]
    try:
        if nodes.rank == 0:
            mark.touch()
        dist.barrier()
        found: list[Any] = [None] * nodes.number
        dist.all_gather_object(found, asdict(_this(folder, mark.exists())))
        dist.barrier()
    finally:
        if nodes.rank == 0:
            mark.unlink(missing_ok=True)
    return [Node(**node) for node in found]


def _this(folder: Path, sees_folder: bool) -> Node:
    import platform

    import torch

    from jointfuse.train.deepspeed_file import has_native_bf16

    return Node(
        name=socket.gethostname(),
        python=platform.python_version(),
        packages={package: version(package) for package in PACKAGES},
        devices=[torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        cores=os.cpu_count() or 1,
        bf16=has_native_bf16(),
        free_bytes=shutil.disk_usage(folder).free,
        sees_folder=sees_folder,
    )


def _compare(found: list[Node], ranks: int, folder: Path) -> None:
    """Raises UserError. The same on every node, so that all of them end."""
    first = found[0]
    for number, node in enumerate(found):
        place = f"node {number} ({node.name})"
        if not node.sees_folder:
            raise UserError(f"{place}: does not see {folder} of node 0; the run must be on a disk they share")
        if node.free_bytes < LEAST_FREE:
            raise UserError(f"{place}: {node.free_bytes / 2**30:.1f} GiB are free in {folder}; make room for the run")
        if bool(node.devices) != bool(first.devices):
            raise UserError(f"{place}: has {len(node.devices)} GPUs, node 0 has {len(first.devices)}")
        if node.devices and len(node.devices) < ranks:
            raise UserError(f"{place}: has {len(node.devices)} GPUs, and --ranks {ranks} asks for one each")
        own = {"python": node.python} | node.packages
        for package, other in ({"python": first.python} | first.packages).items():
            if own[package] != other:
                raise UserError(f"{place}: has {package} {own[package]}, node 0 has {other}; install the same")


def _table(found: list[Node]) -> Table:
    table = Table()
    for name in ("node", "devices", "cores", "free, GiB"):
        table.add_column(name, justify="left" if name in ("node", "devices") else "right")
    for node in found:
        devices = ", ".join(f"{node.devices.count(kind)} x {kind}" for kind in dict.fromkeys(node.devices))
        table.add_row(node.name, devices or "no GPU", str(node.cores), f"{node.free_bytes / 2**30:.0f}")
    return table
