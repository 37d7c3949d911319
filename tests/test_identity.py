"""A resumed build: clips that were replaced are built again, those that were not stay."""

import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from corpus_helpers import build_here, dialogue_rows, hashes, write_clip, write_table
from release_fixtures import make_iemocap

from jointfuse.data import contents
from jointfuse.data.corpora.descriptions import read_description
from jointfuse.data.corpora.files import files_corpus
from jointfuse.data.corpora.iemocap import iemocap_corpus, read_release
from jointfuse.data.corpora.meld import Clip
from jointfuse.data.corpora.meld import read_clips as read_meld_clips
from jointfuse.data.corpora.table import table_corpus
from jointfuse.data.corpora.unpack import unpack
from jointfuse.data.rows import CorpusSpec, Row
from jointfuse.errors import UserError

pytestmark = pytest.mark.required
Renew = Callable[[], CorpusSpec]


def replaced(path: Path, like: Path) -> None:
    """Other content of the same size under the same times, as `cp -p` or `rsync -t` leave them."""
    before = path.stat()
    data = like.read_bytes()
    assert len(data) == before.st_size
    assert data != path.read_bytes()
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def interrupted(spec: CorpusSpec, out: Path, shards: int) -> list[Path]:
    """A build of which so many shards are finished; their tars."""
    rendered = spec.render

    def stopping(rows: list[Row]) -> object:
        if len(list(out.rglob("shard-*.tar"))) == shards:
            raise UserError("stopped")
        return rendered(rows)

    with pytest.raises(UserError, match="stopped"):
        build_here(CorpusSpec(**{**vars(spec), "render": stopping}), out)
    return sorted(out.rglob("shard-*.tar"))


def a_table(folder: Path) -> Renew:
    rows = dialogue_rows("train", 4, 3)
    for number, row in enumerate(rows):
        write_clip(folder / row["audio"], 0.2, pitch=150 + 10 * number)
    table = write_table(folder / "train.csv", rows)
    return lambda: table_corpus([("train", table)], "mine")


def some_files(folder: Path) -> Renew:
    (folder / "mine.yaml").write_text(r"{pattern: '(?P<label>[ab])(?P<take>\d+)\.wav', labels: {a: x, b: y}}")
    for number in range(12):
        write_clip(folder / "wav" / f"{'ab'[number % 2]}{number:02d}.wav", 0.2, pitch=150 + 10 * number)
    described = read_description(folder / "mine.yaml")
    return lambda: files_corpus(folder / "wav", described, "mine")


def an_iemocap(folder: Path) -> Renew:
    root = make_iemocap(folder, {"ang": 20, "sad": 20}, each=4, clips=0)
    for number, path in enumerate(sorted(root.glob("Session*/dialog/transcriptions/*.txt"))):
        for line in path.read_text().splitlines():
            write_clip(
                root / f"{path.parts[-4]}/sentences/wav/{path.stem}/{line.split()[0]}.wav", 0.2, pitch=99 + number
            )
    return lambda: iemocap_corpus(read_release(root), "mine")


def clips_of_meld(folder: Path) -> Renew:
    """MELD's builder without its tables."""
    rows = []
    for turn in range(12):
        write_clip(folder / f"{turn}.wav", 0.3, pitch=150 + 10 * turn)  # FFmpeg reads what it is, not what it is called
        clip = Clip(folder, f"{turn}.wav", None, frozenset())
        row = Row(f"d{turn // 3}", turn, "s", turn % 2, "t", clip, clip.file, "row", file=folder / clip.file)
        rows.append(row)
    dialogues = [rows[n : n + 3] for n in range(0, 12, 3)]
    spec = CorpusSpec("mine", ["x", "y"], {"train": dialogues}, read_meld_clips, "", "", "")
    return lambda: spec


def first_and_last(spec: CorpusSpec) -> tuple[Path, Path]:
    """The clips of the first row and of the last one, which are as long as each other."""
    first, last = spec.splits["train"][0][0].file, spec.splits["train"][-1][-1].file
    assert first is not None
    assert last is not None
    return first, last


@pytest.mark.parametrize("corpus", [a_table, some_files, an_iemocap, clips_of_meld])
def test_a_clip_replaced_by_one_of_the_same_size_is_built_again_and_the_others_are_not(
    tmp_path: Path, corpus: Callable[[Path], Renew]
) -> None:
    renew = corpus(tmp_path)
    clip, other = first_and_last(renew())
    out = tmp_path / "out"
    tars = interrupted(renew(), out, 2)
    stamps = {path: path.stat().st_ino for path in tars}
    replaced(clip, like=other)
    build_here(renew(), out)
    again = {path: path.stat().st_ino for path in tars}
    assert sum(stamps[path] != again[path] for path in tars) == 1
    build_here(renew(), tmp_path / "whole")
    assert hashes(out) == hashes(tmp_path / "whole")
    assert not [path for path in out.rglob("*") if path.name.startswith(".")]


def test_a_resumed_build_reads_only_the_files_that_may_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renew = a_table(tmp_path)
    clip, _ = first_and_last(renew())
    out = tmp_path / "out"
    tars = interrupted(renew(), out, 3)
    stamps = [path.stat().st_ino for path in tars]
    os.utime(clip)  # touched: another time, the same content
    read: list[str] = []
    digest = contents.hashlib.file_digest

    def counted(file: object, name: str) -> object:
        read.append(Path(file.name).name)  # type: ignore[attr-defined]
        return digest(file, name)  # type: ignore[arg-type]

    monkeypatch.setattr(contents.hashlib, "file_digest", counted)
    build_here(renew(), out)
    assert [path.stat().st_ino for path in tars] == stamps
    last = [f"train_3_{turn}.wav" for turn in range(3)]
    assert read == [clip.name, *last]


def test_the_bytes_do_not_depend_on_times_of_files_or_on_the_record_of_them(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    renew = a_table(tmp_path / "here")
    build_here(renew(), tmp_path / "whole")
    shutil.copytree(tmp_path / "here", tmp_path / "there", copy_function=shutil.copyfile)
    there = table_corpus([("train", tmp_path / "there" / "train.csv")], "mine")
    out = tmp_path / "out"
    tars = interrupted(there, out, 3)
    stamps = [path.stat().st_ino for path in tars]
    records = sorted((out / "train").glob(".*.files"))
    assert len(records) == 3
    records[0].unlink()
    records[1].write_text('{"half')
    (out / "train" / "..shard-000009.files.part").write_bytes(b"left by a killed one")
    build_here(renew(), out)
    assert [path.stat().st_ino for path in tars] == stamps
    assert hashes(out) == hashes(tmp_path / "whole")


def test_a_clip_that_changes_while_it_is_read_ends_the_build_by_its_name(tmp_path: Path) -> None:
    renew = a_table(tmp_path)
    spec = renew()
    clip, other = first_and_last(spec)
    rendered = spec.render

    def changing(rows: list[Row]) -> object:
        for row, waveform in zip(rows, rendered(rows), strict=True):
            if row.file == clip:
                replaced(clip, like=other)
            yield waveform

    with pytest.raises(UserError, match=f"{clip}: was changed while it was read; run the same command again"):
        build_here(CorpusSpec(**{**vars(spec), "render": changing}), tmp_path / "out")
    build_here(renew(), tmp_path / "out")
    build_here(renew(), tmp_path / "whole")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_a_clip_that_is_gone_when_its_shard_is_built_is_named_with_its_row(tmp_path: Path) -> None:
    renew = a_table(tmp_path)
    spec = renew()
    clip, _ = first_and_last(spec)
    clip.unlink()
    with pytest.raises(UserError) as caught:
        build_here(spec, tmp_path / "out")
    assert f"train.csv row 2: clip {clip} cannot be read (No such file or directory); mend that" in str(caught.value)


def test_an_archive_is_unpacked_anew_unless_what_lies_there_was_left_by_its_own_unpacking(tmp_path: Path) -> None:
    archive, folder = tmp_path / "a.tar", tmp_path / "a"
    (tmp_path / "a.csv").write_bytes(b"new")
    with tarfile.open(archive, "w") as tar:
        tar.add(tmp_path / "a.csv", "a.csv")
    folder.mkdir()
    (folder / "a.csv").write_bytes(b"old")
    unpack(archive, folder, (".csv",), goes_on=True)
    assert (folder / "a.csv").read_bytes() == b"old"
    unpack(archive, folder, (".csv",))
    assert (folder / "a.csv").read_bytes() == b"new"
