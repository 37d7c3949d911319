"""Disks and servers that are away for a while: waited for, then a fault of its own, never a mistake of the user's."""

import errno
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import run_program
from helpers import reader_of
from training_fixtures import corpus, recipe

from jointfuse import cli, files, patience, ranks
from jointfuse.data.augment import Augmentation
from jointfuse.data.shards import Corpus
from jointfuse.data.stream import stream
from jointfuse.errors import EndedError, PassingFault, UserError, line_and_status
from jointfuse.patience import patiently
from jointfuse.train.writer import Writer

__all__ = ["corpus", "recipe"]

pytestmark = pytest.mark.required
AWAY = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENETDOWN, errno.EHOSTDOWN, errno.ENOTCONN)
STAYS = (errno.ENOENT, errno.EACCES, errno.EISDIR, errno.EMFILE, errno.ENOSPC, errno.EDQUOT)


def failing(times: int, number: int, then: Callable[..., Any]) -> Callable[..., Any]:
    """`then`, but for the first so many calls."""
    failures = iter(range(times))

    def call(*arguments: Any, **options: Any) -> Any:
        if next(failures, None) is not None:
            raise OSError(number, os.strerror(number))
        return then(*arguments, **options)

    return call


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds of each wait, on a clock that goes forward by waiting alone."""
    waits: list[float] = []
    monkeypatch.setattr(patience.time, "sleep", waits.append)
    monkeypatch.setattr(patience.time, "monotonic", lambda: sum(waits))
    return waits


@pytest.mark.parametrize("number", AWAY)
def test_what_is_away_is_waited_for_longer_each_time_and_no_longer_than_is_allowed(
    number: int, slept: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    assert patiently(failing(3, number, lambda: "here"), "/net/file", 60) == "here"
    assert slept == [0.2, 0.4, 0.8]
    assert capsys.readouterr().err == ""
    slept.clear()
    with pytest.raises(PassingFault) as caught:
        patiently(failing(99, number, lambda: "here"), "/net/file", 60)
    assert str(caught.value).startswith(f"/net/file: not to be had for 60 s ({os.strerror(number)}); start again")
    assert sum(slept) == pytest.approx(60)
    assert max(slept) == patience.LONGEST_WAIT
    assert capsys.readouterr().err.count("\n") == 1, "a long wait is said once"


@pytest.mark.parametrize("number", STAYS)
def test_what_does_not_pass_is_not_waited_for(number: int, slept: list[float]) -> None:
    with pytest.raises(OSError, match=os.strerror(number)):
        patiently(failing(1, number, lambda: "here"), "/net/file", 60)
    assert slept == []


@pytest.mark.parametrize(
    ("error", "line", "status"),
    [
        (PassingFault("away"), "away", 75),
        (UserError("wrong,\nand more"), "wrong, and more", 2),
        (EndedError("stopped", 3), "stopped", 3),
        *((OSError(number, os.strerror(number), "f"), f"f: {os.strerror(number)}", 75) for number in AWAY),
        *((OSError(number, os.strerror(number), "f"), f"f: {os.strerror(number)}", 2) for number in STAYS),
    ],
)
def test_a_fault_that_may_pass_has_an_exit_status_of_its_own_in_ranks_and_commands(
    error: Exception,
    line: str,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> bool:
        raise error

    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setattr(cli, "app", fail)
    for main in (cli.main, lambda: ranks.rank_main(fail)):
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == status
        assert capsys.readouterr().err == f"error: {line}\n"


# -------------------------------------------------------------------------------------------------------------- corpora


@pytest.fixture
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)


def test_a_tar_that_is_away_for_a_moment_is_read_and_one_that_stays_away_is_named(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, no_wait: None
) -> None:
    split = Corpus.open(corpus, patience=30).split("dev")
    expected, real = split.sample(0).text, os.pread
    for number in AWAY:
        monkeypatch.setattr(os, "pread", failing(3, number, real))
        assert split.sample(0).text == expected
    split.patience = 0
    monkeypatch.setattr(os, "pread", failing(1, errno.EIO, real))
    with pytest.raises(PassingFault, match=r"dev/shard-000000\.tar: not to be had .*Input/output error"):
        split.sample(0)
    monkeypatch.setattr(os, "pread", failing(1, errno.EACCES, real))
    with pytest.raises(UserError, match=r"sample dev_dev0_000 at byte 0 cannot be read \(Permission denied\)"):
        split.sample(0)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_utterance_is_not_skipped_because_a_disk_was_away(
    workers: int, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = reader_of(Corpus.open(corpus, patience=0), "audio", on_error="skip")
    reader = reader.for_training(Augmentation(reader.settings.augment, 0, 0))
    monkeypatch.setattr(os, "pread", failing(10**6, errno.ESTALE, os.pread))
    planned = [(np.array([0, 1]), np.array([True, True]))]
    with pytest.raises(PassingFault, match="Stale file handle"):
        next(stream(reader, planned, workers))


def test_an_error_of_the_system_comes_out_of_a_decoding_process_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reader:
        def batch(self, planned: object) -> Any:
            raise OSError(errno.EIO, "Input/output error", "/net/file")

    with pytest.raises(OSError, match="Input/output error") as caught:
        next(stream(Reader(), [(np.array([0]), np.array([True]))], workers=1))
    assert line_and_status(caught.value) == ("/net/file: Input/output error", 75)


@pytest.mark.parametrize("name", ["corpus.json", "dev/shard-000000.json", "dev/index.bin", "dev/shard-000000.tar"])
def test_every_file_of_a_corpus_is_waited_for(
    name: str, corpus: Path, monkeypatch: pytest.MonkeyPatch, no_wait: None
) -> None:
    """Reading, mapping and looking at it fail twice each."""

    def use(patience: float) -> str:
        split = Corpus.open(corpus, patience=patience).split("dev")
        return split.key(0) + split.sample(0).text

    expected, calls = use(0), {}

    def failing_twice(key: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Path, *arguments: Any, **options: Any) -> Any:
            if Path(path) == corpus / name:
                calls[key] = calls.get(key, 0) + 1
                if calls[key] <= 2:
                    raise OSError(errno.EIO, "Input/output error", str(path))
            return real(path, *arguments, **options)

        return call

    for owner, function in ((Path, "read_bytes"), (np, "memmap"), (Path, "stat")):
        monkeypatch.setattr(owner, function, failing_twice(function, getattr(owner, function)))
    assert use(30) == expected
    assert max(calls.values()) > 2, "it was asked again"
    calls.clear()
    with pytest.raises(PassingFault, match=f"{name}: not to be had"):
        use(0)


def test_settings_and_positions_on_a_disk_that_is_away_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_wait: None
) -> None:
    path = tmp_path / "position.json"
    path.write_text("{}")
    monkeypatch.setattr(Path, "read_bytes", failing(2, errno.EIO, Path.read_bytes))
    assert files.read_json(path, dict, "") == {}
    monkeypatch.setattr(Path, "read_bytes", failing(1, errno.EIO, Path.read_bytes))
    with pytest.raises(PassingFault, match=f"{path}: not to be had"):
        files.read_text(path, "", patience=0)


def test_a_checkpoint_that_a_disk_does_not_take_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, status in ((errno.EIO, 75), (errno.ENOSPC, 2)):
        monkeypatch.setattr(os, "fsync", failing(1, number, os.fsync))
        with pytest.raises(OSError, match=os.strerror(number)) as caught:
            Writer(background=False).save({}, str(tmp_path / "state.pt"))
        assert line_and_status(caught.value) == (f"{tmp_path / 'state.pt'}: {os.strerror(number)}", status)


# ------------------------------------------------------------------------------------------------------------- programs


def test_a_training_whose_tars_cannot_be_fetched_ends_with_75_through_the_launcher(
    recipe: Path, tmp_path: Path
) -> None:
    command = [str(Path(sys.executable).parent / "jointfuse"), "train", "--recipe", str(recipe), "--ranks", "2"]
    remote = ["data.remote=pipe:false {shard}; exit 7", f"data.cache={tmp_path / 'cache'}", "data.patience=0.1"]
    ended = run_program([*command, "--run", str(tmp_path / "run"), "model.modality=audio", "data.workers=1", *remote])
    assert ended.returncode == 75, ended.stderr
    line = ended.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    assert ": shard train/shard-00000" in line
    assert ": not to be had for " in line
    assert "exit 7" in line


@pytest.mark.parametrize("status", [75, 3, 2, 247])
def test_a_comparison_ends_as_the_training_that_ended_it(
    status: int, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from jointfuse.experiments import modalities

    monkeypatch.setattr(modalities, "launch_training", lambda *_, **__: status)
    monkeypatch.setattr(sys, "argv", ["jointfuse", "compare", "--recipe", str(recipe), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == status
    assert "the same command goes on from there\n" in capsys.readouterr().err
