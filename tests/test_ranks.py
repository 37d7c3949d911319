"""How ranks wait for each other: for as long as a step may take, in every group."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jointfuse.ranks import free_port

pytestmark = pytest.mark.required
SLOW = 6.0  # seconds in which a rank answers no collective
# Meets the other rank in the main group, in one as DeepSpeed forms them and in one as the vote does.
RANK = f"""
import os, sys, time
from pathlib import Path

import torch
import torch.distributed as dist

from jointfuse import ranks

folder, longest, ranks.MARGIN = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
(folder / os.environ["RANK"]).touch()
while len(list(folder.iterdir())) < 2:  # a busy machine imports for longer than some of these timeouts
    time.sleep(0.01)
ranks.join(longest)
groups = [None, dist.new_group(range(2)), dist.new_group(backend="gloo")]
for group in groups:
    dist.barrier(group)
outcomes = []
for group in groups:
    if dist.get_rank():
        time.sleep({SLOW})
    try:
        dist.all_reduce(torch.ones(1), group=group)
        outcomes.append("met")
    except RuntimeError:
        outcomes.append("given up")
print(*outcomes, sep=",", flush=True)
if not dist.get_rank():
    time.sleep(2 * {SLOW})  # the other one would hear that this one has gone
os._exit(0)
"""


def outcomes(longest: float, margin: float, folder: Path) -> list[str]:
    folder.mkdir()
    addresses = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(folder), str(longest), str(margin)],
            env=os.environ | addresses | {"RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=200)[0] for process in both]
    return said[0].strip().split(",")


def test_no_group_gives_a_step_up_that_may_take_as_long_and_every_group_one_that_may_not(tmp_path: Path) -> None:
    assert outcomes(3 * SLOW, 0, tmp_path / "long") == ["met"] * 3
    assert outcomes(SLOW / 4, SLOW / 4, tmp_path / "short") == ["given up"] * 3
