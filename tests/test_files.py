import ast
import os
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from jointfuse import files
from jointfuse.errors import UserError
from jointfuse.files import (
    append_text,
    former,
    naming,
    parse_yaml,
    read_json,
    read_yaml,
    replace_folder,
    write_json,
    write_text,
)

pytestmark = pytest.mark.required
PACKAGE = Path(files.__file__).parent
MUCH = "x" * 10**6


# ------------------------------------------------------------------------------------------------------------- writing


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file grows beyond 20,000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _state(path: Path) -> None:
    from jointfuse.train.writer import Writer

    Writer(background=False).save({"weights": torch.zeros(10**6)}, str(path))


def _weights(path: Path) -> None:
    with naming(path):
        save_file({"weights": torch.zeros(10**6)}, path)


WRITERS: dict[str, Callable[[Path], None]] = {
    "a file that is replaced": lambda path: write_text(path, MUCH),
    "a file that grows": lambda path: append_text(path, MUCH),
    "DeepSpeed's state": _state,
    "weights of a model": _weights,
}


@pytest.mark.usefixtures("full_disk")
@pytest.mark.parametrize("what", WRITERS)
def test_what_does_not_fit_on_the_disk_is_named(what: str, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="File too large") as caught:
        WRITERS[what](tmp_path / "it")
    assert caught.value.filename == str(tmp_path / "it")
    assert not list(tmp_path.glob(".*"))


def test_a_picture_of_a_corpus_that_does_not_fit_is_named_and_nothing_is_left(
    uneven_corpus: Any, tmp_path: Path, full_disk: None
) -> None:
    from jointfuse.data.stats import corpus_stats, plot

    with pytest.raises(OSError, match="File too large") as caught:
        plot(uneven_corpus, corpus_stats(uneven_corpus), tmp_path / "it.png")
    assert caught.value.filename == str(tmp_path / "it.png")
    assert not list(tmp_path.iterdir())


def test_a_mistake_inside_a_file_that_is_written_stays_a_mistake(tmp_path: Path) -> None:
    def refuse() -> None:
        try:
            raise OSError(2, "No such file")
        except OSError as error:
            raise UserError("mend the table") from error

    with pytest.raises(UserError, match="mend the table"), naming(tmp_path / "it"):
        refuse()


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is made sure to be on disk, and what is renamed, in order."""
    events: list[str] = []
    sync, rename, replace = os.fsync, os.rename, os.replace

    def note_sync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "rename", lambda one, other: (events.append("->"), rename(one, other)))
    monkeypatch.setattr(os, "replace", lambda one, other: (events.append("->"), replace(one, other)))
    return events


def test_a_file_and_its_name_are_on_disk_in_that_order(tmp_path: Path, synced: list[str]) -> None:
    write_text(tmp_path / "it", "text")
    assert synced == [".it.part", "->", tmp_path.name]


def test_a_folder_and_its_name_are_on_disk_in_that_order(tmp_path: Path, synced: list[str]) -> None:
    (tmp_path / "part" / "inner").mkdir(parents=True)
    (tmp_path / "part" / "inner" / "file").write_text("text")
    replace_folder(tmp_path / "part", tmp_path / "it")
    assert sorted(synced[:3]) == ["file", "inner", "part"]
    assert synced[3:] == ["->", tmp_path.name]


def _part(folder: Path, number: int) -> Path:
    part = folder / "part"
    part.mkdir()
    (part / "number").write_text(str(number))
    return part


def test_a_folder_that_is_replaced_is_there_at_every_instant(tmp_path: Path) -> None:
    replace_folder(_part(tmp_path, 0), tmp_path / "it")
    missing, ended = [0], threading.Event()

    def look() -> None:
        while not ended.is_set():
            missing[0] += not os.path.exists(tmp_path / "it")

    looking = threading.Thread(target=look)
    looking.start()
    for number in range(1, 200):
        replace_folder(_part(tmp_path, number), tmp_path / "it")
    ended.set()
    looking.join()
    assert missing[0] == 0
    assert (tmp_path / "it" / "number").read_text() == "199"
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


def test_where_two_names_cannot_be_exchanged_the_old_folder_is_kept_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_exchanged", lambda one, other: False)
    replace_folder(_part(tmp_path, 0), tmp_path / "it")
    rename, seen = Path.rename, []

    def watched(path: Path, target: Path) -> Path:
        seen.append([(place / "number").exists() for place in (tmp_path / "it", former(tmp_path / "it"))])
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", watched)
    replace_folder(_part(tmp_path, 1), tmp_path / "it")
    assert seen == [[True, False], [False, True]]
    assert (tmp_path / "it" / "number").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


# What writes otherwise: into a scratch folder, a lock, a part whose room is reserved, DeepSpeed's files in a folder
# without a name yet, and the system's counters.
OTHERS = {
    "launch.py": {"write_text"},
    "experiments/modalities.py": {"rename"},  # a run makes room for another
    "interruption.py": {"open"},
    "data/cache.py": {"open"},
    "train/writer.py": {"open"},
    "bench/device.py": {"write_text"},
}


def writes(tree: ast.AST) -> Iterator[str]:
    """Names of calls by which whole files are written or renamed."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        modes = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        if name in ("write_text", "write_bytes") and isinstance(call.func, ast.Attribute):
            yield name
        if name == "rename" or (name == "replace" and len(call.args) == 1 and not call.keywords):
            yield name
        if name == "replace" and ast.unparse(call.func) == "os.replace":
            yield name
        if name == "open" and any(mode in ("w", "wb", "x", "xb") for mode in modes) and "av." not in ast.unparse(call):
            yield name


def test_one_module_writes_whole_files_and_renames() -> None:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        if names := set(writes(ast.parse(path.read_text(encoding="utf-8")))):
            found[path.relative_to(PACKAGE).as_posix()] = names
    assert found.pop("files.py") == {"open", "rename", "replace"}
    assert found == OTHERS


# ------------------------------------------------------------------------------------------------------------- reading


def test_half_of_a_surrogate_pair_is_written_as_its_escape_and_read_again(tmp_path: Path) -> None:
    write_json(tmp_path / "it.json", {"name": "half \ud83d"})
    assert read_json(tmp_path / "it.json", dict[str, str], "mend it") == {"name": r"half \ud83d"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 10**5, "Invalid JSON: recursion limit exceeded"),
        ("{", "Invalid JSON: EOF"),
        ('{"a": "b"}', "a: Input should be a valid integer"),
    ],
)
def test_json_that_cannot_be_used_is_named_with_its_place(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "it.json").write_text(text)
    with pytest.raises(UserError) as caught:
        read_json(tmp_path / "it.json", dict[str, int], "mend it")
    assert str(caught.value).startswith(f"{tmp_path / 'it.json'}: {says}")


@pytest.mark.parametrize("text", ["a: 2001-99-99", f"a: {'1' * 5000}", "a: " + "[" * 3000, "a: 1\na: 2", "a: [", "\0"])
def test_yaml_that_cannot_be_used_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "it.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        read_yaml(tmp_path / "it.yaml", "mend it")
    assert str(caught.value).startswith(f"{tmp_path / 'it.yaml'}: not valid YAML (")
    assert str(caught.value).endswith("; mend it")
    assert "\n" not in str(caught.value)


def test_a_date_that_is_none_is_no_yaml() -> None:
    import yaml

    with pytest.raises(yaml.YAMLError):
        parse_yaml("2001-99-99")
