"""What is looked at before a job starts."""

import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pace import stretched

from jointfuse import doctor
from jointfuse.errors import UserError
from jointfuse.launch import Nodes
from jointfuse.ranks import free_port

PROGRAM = str(Path(sys.executable).parent / "jointfuse")


def node(**changes: object) -> doctor.Node:
    one = doctor.Node("here", "3.11", {"torch": "2.11"}, [], 2, True, 2**40, True)
    return replace(one, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"sees_folder": False}, "node 1 (there): does not see /runs of node 0"),
        ({"free_bytes": 2**29}, "node 1 (there): 0.5 GiB are free in /runs"),
        ({"devices": ["GPU"]}, "node 1 (there): has 1 GPUs, node 0 has 0"),
        ({"packages": {"torch": "2.10"}}, "node 1 (there): has torch 2.10, node 0 has 2.11"),
        ({"python": "3.12"}, "node 1 (there): has python 3.12, node 0 has 3.11"),
    ],
)
def test_a_node_that_is_not_as_it_must_be_is_named(other: dict[str, object], says: str) -> None:
    doctor._compare([node(), node(name="there")], 2, Path("/runs"))
    with pytest.raises(UserError) as caught:
        doctor._compare([node(), node(name="there", **other)], 2, Path("/runs"))
    assert says in str(caught.value)
    with pytest.raises(UserError, match=r"node 0 \(here\): has 1 GPUs, and --ranks 2 asks for one each"):
        doctor._compare([node(devices=["GPU"])], 2, Path("/runs"))


@pytest.mark.parametrize(
    ("nodes", "says"),
    [
        ((2, 2, "a:1"), "--node-rank 2: of 2 nodes"),
        ((2, 0, ""), "--master '': write HOST:PORT"),
        ((2, 0, "host"), "--master 'host': write HOST:PORT"),
        ((1, 0, "host:x"), "--master 'host:x': write HOST:PORT"),
    ],
)
def test_nodes_that_do_not_fit_together_are_refused(nodes: tuple[int, int, str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        Nodes(*nodes)
    assert says in str(caught.value)


@pytest.mark.required
def test_two_nodes_meet_and_the_first_says_what_they_are(tmp_path: Path) -> None:
    master = f"127.0.0.1:{free_port()}"
    command = [PROGRAM, "doctor", "--run", str(tmp_path / "run"), "--nodes", "2", "--master", master]
    both = [
        subprocess.Popen([*command, "--node-rank", rank], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    (said, complained), (other, _) = (process.communicate(timeout=stretched(120)) for process in both)
    assert [process.returncode for process in both] == [0, 0], complained
    assert said.count(socket.gethostname()) == 2
    assert other == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.required
def test_a_node_that_nobody_answers_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from datetime import timedelta

    monkeypatch.setattr(doctor, "WAIT", timedelta(seconds=2))
    with pytest.raises(UserError) as caught:
        doctor.examine(tmp_path / "run", 1, Nodes(2, 1, f"127.0.0.1:{free_port()}"), doctor.Console())
    assert "the 2 nodes did not meet at 127.0.0.1:" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.required
def test_a_cpu_without_bf16_is_named_with_the_float32_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for native in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda native=native: {"avx2": True, "avx512_bf16": native})
        doctor.examine(tmp_path / "run", 1, Nodes(), doctor.Console())
        line = f"{socket.gethostname()}: no GPU, and a CPU without instructions for bf16"
        shown = capsys.readouterr().out
        assert (line in shown) == (not native)
        assert ("choose zero2 rather than zero2_bf16" in shown) == (not native)
