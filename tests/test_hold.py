"""One training at a time works on a run, and a run whose training died is told from one that goes on."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from corpus_helpers import hashes
from running import started, step_of, until
from training_fixtures import corpus, recipe

from jointfuse import cli, launch
from jointfuse.errors import PassingFault
from jointfuse.lock import Lock, locked
from jointfuse.train.hold import Hold, is_held
from jointfuse.train.run_folder import DIED, RUNNING, describe_run, read_status, write_status

__all__ = ["corpus", "recipe"]

pytestmark = pytest.mark.required
HOLDS = """
import sys
from pathlib import Path
from jointfuse.lock import Lock

lock = Lock(Path(sys.argv[1]))
print(lock.take(), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("folder", [False, True])
def test_a_lock_is_one_process_s_until_that_dies_of_whatever(folder: bool, tmp_path: Path) -> None:
    path = tmp_path if folder else tmp_path / "lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"True\n"
        with locked(path, wait=False) as had:
            assert not had
        assert not Lock(path).take(shared=True)
        process.kill()
        process.wait()
    with locked(path, wait=False) as had:
        assert had


def test_who_only_looks_does_not_see_others_who_look_and_keeps_nobody_out(tmp_path: Path) -> None:
    Hold(tmp_path).take()  # let go of at once, since nothing keeps it
    lock = Lock(tmp_path / "lock")
    assert lock.take(shared=True)
    assert not is_held(tmp_path)
    assert not (tmp_path / "other").exists()
    assert not is_held(tmp_path / "other")
    assert not (tmp_path / "other").exists(), "looking makes nothing"


def test_a_process_that_is_forked_does_not_go_on_holding_a_run(tmp_path: Path) -> None:
    hold = Hold(tmp_path)
    hold.take()
    assert hold.lock is not None
    ended, end = os.pipe()
    begun, begin = os.pipe()
    child = os.fork()
    if not child:
        os.close(end)
        os.write(begin, b"x")
        os.read(ended, 1)
        os._exit(0)
    os.read(begun, 1)
    assert is_held(tmp_path), "the child has closed its copy alone"
    hold.lock.close()  # as the death of this process would
    assert not is_held(tmp_path)
    os.close(end)
    os.waitpid(child, 0)


def said_by(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    """Status, output and errors of `jointfuse ARGUMENTS`, its ranks left out."""
    monkeypatch.setattr(launch, "launch", lambda *_, **__: 0)
    monkeypatch.setattr(sys, "argv", ["jointfuse", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr()
    return int(str(ended.value.code or 0)), printed.out, printed.err


def test_a_second_training_is_refused_and_a_killed_one_is_known_to_be_dead(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    settings = ["--recipe", str(recipe), "--run", str(run)]
    command = [sys.executable, "-m", "jointfuse.train", *settings, "train.steps=100000", "train.save_every=2 steps"]
    with started([*command, "data.workers=1"], run, OMP_NUM_THREADS="1") as process:
        until("some steps", lambda: process.poll() is not None or step_of(run) >= 4)
        before = hashes(run / "checkpoints" / ".." / "tokenizer")
        where = f"on {socket.gethostname()} as process {process.pid}"
        refusal = f"error: {run}: a training works on this run already, {where}; wait for it, stop it, or choose"
        for more in ([], ["--resume"]):
            status, _, errors = said_by(monkeypatch, capsys, "train", *settings, *more)
            assert status == 75
            assert errors.startswith(refusal)
            assert errors.count("\n") == 1
        with pytest.raises(PassingFault, match="a training works on this run already"):
            Hold(run).take()
        assert read_status(run) == RUNNING
        assert f"{run}: is running {where}, at step " in said_by(monkeypatch, capsys, "doctor", "--run", run)[1]
        assert hashes(run / "tokenizer") == before
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert read_status(run) == DIED, "though its decoding process may live still"
    died = rf"{run}: was running {where} and died after step \d+; --resume goes on from its last checkpoint\n"
    assert re.search(died, said_by(monkeypatch, capsys, "doctor", "--run", run)[1])
    status, _, errors = said_by(monkeypatch, capsys, "train", *settings, "--resume", "train.steps=100000")
    assert re.match(died, errors)
    assert status == 1, "there was no rank to finish it"
    Hold(run).take()


@pytest.mark.parametrize(
    ("status", "says"),
    [("stopped", "stopped after step 0 when asked to; --resume"), ("finished", "finished at step 0; with more train.")],
)
def test_what_has_ended_is_said_to_have(status: str, says: str, tmp_path: Path) -> None:
    assert describe_run(tmp_path) == ""
    write_status(tmp_path, status)
    assert f"{tmp_path}: {says}" in describe_run(tmp_path)


def test_a_run_of_another_machine_that_nothing_holds_is_not_sworn_to_be_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_status(tmp_path, RUNNING)
    hold = Hold(tmp_path)
    hold.take()
    hold.release()
    assert " and died after step 0; --resume" in describe_run(tmp_path)
    monkeypatch.setattr(socket, "gethostname", lambda: "another")
    assert "died after step 0 (unless its disk carries no locks between machines); --resume" in describe_run(tmp_path)


def test_a_second_comparison_in_one_folder_is_refused(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with locked(tmp_path):
        status, _, errors = said_by(monkeypatch, capsys, "compare", "--recipe", recipe, "--out", tmp_path)
    assert status == 75
    assert errors == f"error: {tmp_path}: another comparison works here; wait for it or choose another --out\n"
    assert list(tmp_path.iterdir()) == []
