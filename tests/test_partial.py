"""A part of MELD or IEMOCAP: refused with what is missing, or built with it listed."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from corpus_helpers import build_here, run_tool
from meld_fixture import make_meld
from release_fixtures import make_iemocap

from jointfuse.data.corpora.iemocap import iemocap_corpus, read_release
from jointfuse.data.corpora.meld import meld_corpus
from jointfuse.data.corpora.meld_places import FOLDERS, TABLES
from jointfuse.data.index import UNLABELLED
from jointfuse.data.shards import Corpus
from jointfuse.data.verify import verify
from jointfuse.errors import UserError

pytestmark = pytest.mark.required
COUNTS = {"hap": 12, "sad": 13, "neu": 20, "ang": 11, "exc": 8, "fru": 9, "sur": 3, "fea": 1, "xxx": 6}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_iemocap(tmp_path_factory.mktemp("iemocap"), COUNTS)


@pytest.fixture
def iemocap(release: Path, tmp_path: Path) -> Path:
    """To be taken apart."""
    return Path(shutil.copytree(release, tmp_path / "IEMOCAP_full_release"))


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, int]]]:
    folder = tmp_path_factory.mktemp("meld") / "MELD.Raw"
    return folder, make_meld(folder)


@pytest.fixture
def meld(raw: tuple[Path, dict[str, dict[str, int]]], tmp_path: Path) -> Path:
    """To be taken apart."""
    return Path(shutil.copytree(raw[0], tmp_path / "MELD.Raw"))


def part_of_iemocap(path: Path, out: Path, view: str = "all", **options: Any) -> Corpus:
    build_here(iemocap_corpus(read_release(path, partial=True), "part", view, **options), out, samples_per_shard=50)
    return Corpus.open(out)


def faults(corpus: Corpus) -> dict[tuple[str, str], str]:
    """(split, file) -> fault, of those that are of no single file's."""
    return {(one["split"], one["file"]): one["fault"] for one in corpus.info["faults"]}


def lose_a_folder(root: Path) -> tuple[str, ...]:
    shutil.rmtree(root / "Session5")
    shutil.rmtree(root / "Session3" / "dialog")
    return "Session5: no such folder", "Session3/dialog/EmoEvaluation: no such folder"


def lose_the_clips_of_the_test(root: Path) -> tuple[str, ...]:
    shutil.rmtree(root / "Session5" / "sentences")
    turns = len([turn for turn in read_release(root, partial=True).turns if turn.session == 5])
    lost = f"no such folder: {turns} of the clips of {turns} turns are missing or of no use"
    return f"Session5/sentences/wav: {lost}", "or without the clips with --text-only"


def lose_transcripts(root: Path) -> tuple[str, ...]:
    for path in (root / "Session2" / "dialog" / "transcriptions").glob("*01.txt"):
        path.unlink()
    return "Session2/dialog/transcriptions: ", "of the transcripts of 16 turns are missing"


def lose_every_turn(root: Path) -> tuple[str, ...]:
    for path in (root / "Session5" / "dialog" / "EmoEvaluation").glob("*.txt"):
        path.write_text("", encoding="utf-8")
    return ("Session5/dialog/EmoEvaluation: no turn in any of its label files",)


@pytest.mark.parametrize("lose", [lose_a_folder, lose_the_clips_of_the_test, lose_transcripts, lose_every_turn])
def test_a_part_of_iemocap_is_refused_with_what_is_missing_and_the_way_out(
    lose: Any, iemocap: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reasons = lose(iemocap)
    status, _, err = run_tool("build_shards", "iemocap", iemocap, "--out", tmp_path / "out", capsys=capsys)
    assert status == 2
    assert err.count("\n") == 1
    for reason in (*reasons, "unpack it again, or build what is there with --partial"):
        assert reason in err
    assert "has no utterances" not in err
    assert not (tmp_path / "out").exists()


def test_the_sessions_of_iemocap_that_are_there_are_built_and_the_others_listed(iemocap: Path, tmp_path: Path) -> None:
    lose_a_folder(iemocap)
    corpus = part_of_iemocap(iemocap, tmp_path / "out")
    assert corpus.splits == ["train", "dev"]
    listed = faults(corpus)
    assert listed["", "Session5"] == listed["", "Session3/dialog/EmoEvaluation"] == "no such folder"
    assert "no turn is there" in listed["test", ""]
    speakers = {speaker[:5] for speaker in corpus.speakers}
    assert speakers == {"Ses01", "Ses02", "Ses04"}
    assert "Of what was there of the release" in corpus.info["description"]
    assert not verify(corpus.path, workers=1).faults


def test_one_session_of_iemocap_is_a_corpus_to_score_on(iemocap: Path, tmp_path: Path) -> None:
    for session in (1, 2, 3, 4):
        shutil.rmtree(iemocap / f"Session{session}")
    corpus = part_of_iemocap(iemocap, tmp_path / "out", "six")
    assert corpus.splits == ["test"]
    assert corpus.mel is None
    shutil.rmtree(iemocap / "Session5" / "dialog" / "transcriptions")
    with pytest.raises(UserError, match="nothing to build from: Session1 no such folder"):
        part_of_iemocap(iemocap, tmp_path / "none")


def test_turns_of_iemocap_whose_clips_are_missing_are_heard_by_their_text(iemocap: Path, tmp_path: Path) -> None:
    shutil.rmtree(iemocap / "Session1" / "sentences")
    corpus = part_of_iemocap(iemocap, tmp_path / "out")
    split = corpus.split("train")
    of_first = [id for id in range(len(split)) if split.sample(id).dialogue.startswith("Ses01")]
    assert of_first
    assert {int(split.index["label"][id]) for id in of_first} == {UNLABELLED}
    (fault,) = [one for one in corpus.info["faults"] if one["file"] == "Session1/sentences/wav"]
    assert fault["fault"].startswith("no such folder: ")
    assert fault["done"] == "kept as context, without a label"
    assert len(corpus.info["faults"]) == 1, "one for the folder, none for each of its clips"


def test_counts_of_a_part_are_told_beside_the_published(
    iemocap: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("build_shards", "iemocap", iemocap, "--out", tmp_path / "out", "--workers", 1)
    status, _, err = run_tool(*command, capsys=capsys)
    assert status == 2
    assert "published are 5531 (angry 11 of 1103" in err
    assert "or build a part with --partial" in err
    status, out, err = run_tool(*command, "--partial", capsys=capsys)
    assert status == 0, err
    assert "happy 12 of 595, sad 13 of 1084" in out
    (fault,) = Corpus.open(tmp_path / "out").info["faults"]
    assert fault["fault"].startswith("the label files give 64 turns in four classes, published are 5531 (angry 11 of")


def test_iemocap_is_built_from_its_texts_alone(
    iemocap: Path, release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for session in range(1, 6):
        shutil.rmtree(iemocap / f"Session{session}" / "sentences")
    build_here(iemocap_corpus(read_release(iemocap, text_only=True), "texts"), tmp_path / "texts")
    build_here(iemocap_corpus(read_release(release), "sounds"), tmp_path / "sounds")
    texts, sounds = (Corpus.open(tmp_path / name) for name in ("texts", "sounds"))
    assert texts.info["faults"] == []
    for name in texts.splits:
        one, other = texts.split(name), sounds.split(name)
        assert (one.index["duration_ms"] == 0).all()
        assert one.index["label"].tolist() == other.index["label"].tolist()
        assert [one.sample(id).text for id in range(len(one))] == [other.sample(id).text for id in range(len(other))]
    command = ("iemocap", iemocap, "--out", tmp_path / "out", "--workers", 1, "--text-only", "--partial")
    status, out, err = run_tool("build_shards", *command, capsys=capsys)
    assert status == 0, err
    assert "usable clip" not in out


def test_a_part_of_meld_is_refused_with_all_that_is_missing(
    meld: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*options: object) -> str:
        command = ("meld", meld, "--out", tmp_path / "out", "--scratch", tmp_path / "scratch", *options)
        status, _, err = run_tool("build_shards", *command, capsys=capsys)
        assert status == 2
        assert err.count("\n") == 1
        return err

    (meld / TABLES["dev"]).unlink()
    shutil.rmtree(meld / FOLDERS["test"])
    lacking = "holds no dev_sent_emo.csv, no output_repeated_splits_test; give MELD.Raw.tar.gz or the folder MELD.Raw"
    assert f"{lacking}, or --partial to build what is there" in refused()
    for table in TABLES.values():
        (meld / table).unlink(missing_ok=True)
    assert "no table of MELD has a row; take the CSVs of MELD.Raw" in refused("--partial")


def without_clips(meld: Path) -> list[str]:
    """Take half of the clips of train away; their names."""
    clips = sorted((meld / FOLDERS["train"]).glob("dia[4567]_*.mp4"))
    for clip in clips:
        clip.unlink()
    return [f"{FOLDERS['train']}/{clip.name}" for clip in clips]


def test_a_folder_of_meld_that_lacks_many_clips_is_refused_with_the_way_out(
    raw: tuple[Path, dict[str, dict[str, int]]], meld: Path
) -> None:
    without_clips(meld)
    with pytest.raises(UserError, match="are missing; unpack the archive again, or give --text-only, or --partial"):
        meld_corpus(meld, published=raw[1])


def test_a_part_of_meld_is_built_and_what_is_missing_listed(
    raw: tuple[Path, dict[str, dict[str, int]]], meld: Path, tmp_path: Path
) -> None:
    clips = without_clips(meld)
    (meld / TABLES["dev"]).unlink()
    shutil.rmtree(meld / FOLDERS["test"])
    build_here(meld_corpus(meld, partial=True), tmp_path / "out", samples_per_shard=50)
    corpus = Corpus.open(tmp_path / "out")
    assert corpus.splits == ["train", "test"]
    assert "Of what was there of the release" in corpus.info["description"]
    listed = faults(corpus)
    assert listed["dev", TABLES["dev"]] == "no such table"
    assert listed["test", FOLDERS["test"]] == "no such folder: 12 utterances have no clip"
    for split in corpus.splits:
        counts = [one["fault"] for one in corpus.info["faults"] if one["file"] == TABLES[split]]
        assert any(one.startswith(f"{sum(raw[1][split].values())} utterances, MELD has ") for one in counts)
    missing = [one["file"] for one in corpus.info["faults"] if one["fault"].startswith("there is no clip")]
    assert missing == clips
    assert (corpus.split("test").index["duration_ms"] == 0).all()
    assert not verify(corpus.path, workers=1).faults


def test_the_test_table_of_meld_alone_is_a_corpus_to_score_on(meld: Path, tmp_path: Path) -> None:
    for split in ("train", "dev"):
        (meld / TABLES[split]).unlink()
    build_here(meld_corpus(meld, text_only=True, partial=True), tmp_path / "out")
    corpus = Corpus.open(tmp_path / "out")
    assert corpus.splits == ["test"]
    assert corpus.mel is None
