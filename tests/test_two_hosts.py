"""Two hosts of their own addresses: network namespaces joined by one cable, which can be pulled."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from distributed import run_ranks
from pace import stretched
from running import (
    LIMIT,
    PROGRAM,
    RECORDED,
    assert_same_steps,
    processes_of,
    saved_step,
    started,
    step_of,
    until,
)
from training_fixtures import DROPOUT, corpus, recipe, train

__all__ = ["corpus", "recipe"]

pytestmark = [pytest.mark.required, pytest.mark.timeout(1800)]
STEPS = 60
LONGEST = 20  # seconds of a step
SETTINGS = (f"train.steps={STEPS}", "train.save_every=5 steps", f"train.longest_step={LONGEST}", RECORDED, *DROPOUT)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Names of two namespaces; their addresses are 10.213.0.1 and 10.213.0.2, the interfaces `cable`."""
    if not shutil.which("ip"):
        pytest.skip("ip is not installed (Debian: apt install iproute2)")
    if os.geteuid() != 0:
        pytest.skip("only root can make network namespaces")
    names = [f"jointfuse{os.getpid()}{side}" for side in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for number, name in enumerate(names, start=1):
            ip("-n", name, "address", "add", f"10.213.0.{number}/24", "dev", "cable")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "cable", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def both(stack: ExitStack, hosts: list[str], recipe: Path, run: Path, *options: str) -> list[subprocess.Popen[bytes]]:
    """`jointfuse train` on either host; what it says goes to `output`, in a folder of each, beside the run."""
    arguments = ["--recipe", str(recipe), "--run", str(run), "--ranks", "1", *options]
    place = ["--nodes", "2", "--master", "10.213.0.1:29400"]
    commands = [
        ["ip", "netns", "exec", host, PROGRAM, "train", *arguments, *place, "--node-rank", str(number)]
        for number, host in enumerate(hosts)
    ]
    return [stack.enter_context(started(command, run, OMP_NUM_THREADS="1")) for command in commands]


def test_a_cut_link_ends_both_hosts_and_mended_they_go_on(hosts: list[str], recipe: Path, tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "output"
    with ExitStack() as stack:
        processes = both(stack, hosts, recipe, run, *SETTINGS)
        until("ten steps", lambda: step_of(run) >= 10 or any(process.poll() is not None for process in processes))
        ip("-n", hosts[1], "link", "set", "cable", "down")
        # The watchdog's time, and what DeepSpeed's launcher waits for a rank to go.
        statuses = [process.wait(LONGEST + stretched(LIMIT)) for process in processes]
        said = output.read_text()
        assert statuses == [1, 1], said
        assert processes_of(run) == []
    for rank in (0, 1):
        assert f"error: rank {rank}: step " in said, "the watchdog of each side, which knows nothing of the other"
    assert "Traceback" not in said
    saved = saved_step(run)
    assert 5 <= saved < STEPS
    ip("-n", hosts[1], "link", "set", "cable", "up")
    with ExitStack() as stack:
        processes = both(stack, hosts, recipe, run, "--resume", *SETTINGS)
        assert [process.wait(stretched(LIMIT)) for process in processes] == [0, 0], output.read_text()
    assert f"resumed at step {saved} " in output.read_text()
    run_ranks(2, train, tmp_path / "ranks", recipe, tmp_path / "whole", *SETTINGS)
    assert_same_steps(run, tmp_path / "whole", tolerance=1e-6)
