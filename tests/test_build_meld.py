"""MELD in its original form becomes a corpus, and what is wrong with it is named."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from corpus_helpers import hashes, run_tool
from distributed import run_ranks
from hypothesis import given
from hypothesis import strategies as st
from meld_fixture import DIALOGUES, MENDED, make_meld, write_table
from training_fixtures import RECIPE, train

from jointfuse.data.build import build
from jointfuse.data.corpora import meld
from jointfuse.data.corpora.meld import FOLDERS, LABELS, PUBLISHED, TABLES, meld_corpus
from jointfuse.data.corpora.text import repair
from jointfuse.data.shards import Corpus
from jointfuse.errors import UserError

pytestmark = pytest.mark.required
Published = dict[str, dict[str, int]]
KEPT_WITHOUT = "kept without a clip"
# (split, key, file, fault as it begins, done)
PLANTED = [
    ("train", None, "train_splits/dia50_utt1.mp4", "no row of this split is for this clip, one of another", "left out"),
    ("train", None, "train_splits/dia900_utt0.mp4", "no row is for this file (new)", "left out"),
    ("train", None, "train_splits/notes.txt", "no row is for this file (new)", "left out"),
    ("train", "train_dia0_001", "train_splits/dia0_utt1.mp4", "the clip cannot be decoded: Invalid", KEPT_WITHOUT),
    ("train", "train_dia1_000", "train_splits/dia1_utt0.mp4", "the clip has no audio track: ", KEPT_WITHOUT),
    ("train", "train_dia2_002", "train_splits/dia2_utt2.mp4", "the clip lasts minutes: 61.", KEPT_WITHOUT),
    ("train", "train_dia3_001", "train_splits/dia3_utt1.mp4", "the clip is empty: an empty file (new)", KEPT_WITHOUT),
    ("train", "train_dia4_000", "train_sent_emo.csv", "two rows for one clip: dia4_utt0, row 18 and", "the first one"),
    (
        "train",
        "train_dia5_001",
        "train_splits/dia5_utt1.mp4",
        "the clip is not as long as its row says: ",
        "kept whole",
    ),
    ("train", "train_dia125_003", "train_splits/dia125_utt3.mp4", "the clip cannot be decoded: ", KEPT_WITHOUT),
    ("dev", "dev_dia50_001", "dev_splits_complete/dia50_utt1.mp4", "there is no clip (new)", KEPT_WITHOUT),
    ("dev", "dev_dia110_007", "dev_splits_complete/dia110_utt7.mp4", "there is no clip (known)", KEPT_WITHOUT),
    ("test", None, "test_sent_emo.csv", "texts in a broken encoding: 3 in 2 rows (new)", "mended"),
    ("test", None, "test_sent_emo.csv", "characters lost to an encoding (U+FFFD): 1 in 1 rows (new)", "left as they"),
    ("test", None, "output_repeated_splits_test/final_videos_test*", "stray copies of clips: 2, the first", "left out"),
    ("test", None, "output_repeated_splits_test/._*", "what macOS leaves in archives: 1, the first ._dia", "left out"),
    (
        "test",
        "test_dia2_003",
        "test_sent_emo.csv",
        "the row ends when or before it starts: ",
        "its clip is not checked",
    ),
]
WITHOUT_CLIP = {"train": 5, "dev": 2, "test": 0}


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Published]:
    folder = tmp_path_factory.mktemp("meld") / "MELD.Raw"
    return folder, make_meld(folder)


@pytest.fixture(scope="module")
def built(raw: tuple[Path, Published], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "meld"
    build(meld_corpus(raw[0], published=raw[1]), out, workers=2, samples_per_shard=12)
    return out


@pytest.fixture
def copy(raw: tuple[Path, Published], tmp_path: Path) -> Path:
    return Path(shutil.copytree(raw[0], tmp_path / "MELD.Raw"))


def refused(*arguments: object, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line a failing build ends with."""
    status, _, err = run_tool("build_shards", "meld", *arguments, capsys=capsys)
    lines = [line for line in err.splitlines() if not line.startswith(("building ", "unpacking "))]
    assert status == 2, err
    assert len(lines) == 1, err
    return lines[0].removeprefix("error: ")


# -------------------------------------------------------------------------------------------------------------- faults


def test_every_planted_fault_is_named_once_and_nothing_else_is(built: Path) -> None:
    faults = Corpus.open(built).info["faults"]
    for split, key, file, fault, done in PLANTED:
        found = [one for one in faults if (one["split"], one["key"], one["file"]) == (split, key, file)]
        found = [one for one in found if one["fault"].startswith(fault)]
        assert len(found) == 1, f"{file}: {fault} is not among {json.dumps(faults, indent=1)}"
        assert found[0]["done"].startswith(done)
        assert set(found[0]) == {"split", "key", "file", "fault", "done"}
        assert str(built.parent) not in json.dumps(found)
    assert len(faults) == len(PLANTED), faults
    assert [one["split"] for one in faults] == sorted((one["split"] for one in faults), key=list(FOLDERS).index)
    known = {one["key"] for one in faults if one["fault"].endswith("(known)") and one["key"]}
    assert known == {"train_dia125_003", "dev_dia110_007"}


def test_every_row_of_the_tables_is_an_utterance_or_told_to_be_given_twice(
    built: Path, raw: tuple[Path, Published]
) -> None:
    rows = Corpus.open(built).info["rows"]
    for split, table in TABLES.items():
        with next(raw[0].rglob(table)).open(newline="", encoding="latin-1") as file:
            assert rows[split]["read"] == len(list(csv.DictReader(file)))
        assert rows[split]["utterances"] == sum(raw[1][split].values())
    assert {split: counts.get("rows given twice") for split, counts in rows.items()} == {
        "train": 1,
        "dev": None,
        "test": None,
    }


def test_an_utterance_whose_clip_is_faulty_keeps_its_text(built: Path) -> None:
    corpus = Corpus.open(built)
    for split in FOLDERS:
        utterances = {one.key: one for one in map(corpus.split(split).sample, range(len(corpus.split(split))))}
        without = {key for key, one in utterances.items() if one.waveform is None}
        told = {fault[1] for fault in PLANTED if fault[0] == split and fault[4] == KEPT_WITHOUT}
        assert without == told
        assert len(without) == WITHOUT_CLIP[split]
        assert all(one.text for one in utterances.values())
        assert len(utterances) == 4 * len(DIALOGUES[split])
        for key, one in utterances.items():
            if one.waveform is not None and key not in ("train_dia5_001", "test_dia2_003"):
                seconds = len(one.waveform) / 16_000
                assert seconds == pytest.approx(one.meta["end"] - one.meta["start"], abs=0.05)
                assert 0.02 < np.abs(one.waveform / 32768).max() < 1


def test_rows_become_utterances_with_all_that_meld_says(built: Path, raw: tuple[Path, Published]) -> None:
    corpus = Corpus.open(built)
    assert corpus.labels == list(LABELS)
    assert {split: corpus.info["splits"][split]["label_counts"] for split in FOLDERS} == raw[1]
    assert corpus.speakers == ["Chandler", "Monica", "Richard’s Date"]
    split = corpus.split("test")
    texts = {f"test_dia0_00{turn}": MENDED[f"dia0_utt{turn}"] for turn in range(3)}
    assert {split.sample(i).key: split.sample(i).text for i in range(3)} == texts
    with (raw[0] / TABLES["test"]).open(newline="", encoding="utf-8") as file:
        row = list(csv.DictReader(file))[5]
    utterance = split.sample(5)
    assert utterance.key == "test_dia1_001"
    assert utterance.meta["emotion"] == row["Emotion"]
    assert utterance.meta["sentiment"] == row["Sentiment"]
    assert (utterance.meta["season"], utterance.meta["episode"]) == (int(row["Season"]), int(row["Episode"]))
    assert (utterance.dialogue, utterance.turn, utterance.speaker) == ("test_dia1", 1, row["Speaker"])
    assert 60 < utterance.meta["start"] < utterance.meta["end"] < 70


def test_it_verifies_and_its_mel_statistics_are_those_of_the_training_clips(
    built: Path, raw: tuple[Path, Published], tmp_path: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run_tool("verify_shards", built, "--workers", 1, capsys=capsys)
    assert status == 0, out + err
    for clip in (copy / FOLDERS["test"]).glob("dia*.mp4"):
        shutil.copyfile(raw[0] / FOLDERS["test"] / "dia0_utt0.mp4", clip)
    build(meld_corpus(copy, published=raw[1]), tmp_path / "other", workers=1, samples_per_shard=12)
    assert Corpus.open(tmp_path / "other").info["mel"] == Corpus.open(built).info["mel"]
    assert hashes(tmp_path / "other")["test/index.bin"] != hashes(built)["test/index.bin"]
    assert Corpus.open(built).mel_deviation > 0.5


def test_it_trains_for_twenty_steps(built: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    data = RECIPE["data"] | {"corpus": str(built), "missing_modality": "allow", "max_seconds": 4.0}
    recipe.write_text(yaml.safe_dump(RECIPE | {"data": data}), encoding="utf-8")
    (trained, _) = run_ranks(2, train, tmp_path / "ranks", recipe, tmp_path / "run")
    assert trained.losses.shape == (20, 3)
    assert np.isfinite(trained.losses).all()


# ----------------------------------------------------------------------------------------------------------- the bytes


def test_an_interrupted_build_goes_on_and_keeps_the_faults_it_had_found(
    built: Path, raw: tuple[Path, Published], tmp_path: Path
) -> None:
    out = tmp_path / "meld"
    shutil.copytree(built, out)
    (out / "corpus.json").unlink()
    (out / "train" / "shard-000001.json").unlink()
    first = out / "train" / "shard-000000.tar"
    stamp = first.stat().st_mtime_ns
    build(meld_corpus(raw[0], published=raw[1]), out, workers=1, samples_per_shard=12)
    assert first.stat().st_mtime_ns == stamp, "it held the corrupt clip, and was not read again"
    assert hashes(out) == hashes(built)


def tarred(folder: Path, archive: Path, names: dict[str, Path] | None = None) -> Path:
    with tarfile.open(archive, "w:gz") as tar:
        for name, path in (names or {path.name: path for path in sorted(folder.iterdir())}).items():
            tar.add(path, name)
    return archive


@pytest.fixture(scope="module")
def outer(raw: tuple[Path, Published], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MELD.Raw.tar.gz: the CSVs and an archive a split."""
    folder = tmp_path_factory.mktemp("archives")
    names = {f"MELD.Raw/{table}": raw[0] / table for table in TABLES.values()}
    for split, clips in FOLDERS.items():
        inner = tarred(raw[0], folder / f"{split}.tar.gz", {clips: raw[0] / clips})
        names[f"MELD.Raw/{split}.tar.gz"] = inner
    return tarred(folder, folder / "MELD.Raw.tar.gz", names)


def test_the_archive_as_distributed_gives_the_same_bytes_and_is_unpacked_once(
    built: Path, raw: tuple[Path, Published], outer: Path, tmp_path: Path
) -> None:
    scratch = tmp_path / "scratch"
    clips = scratch / "MELD" / "MELD.Raw" / "train" / FOLDERS["train"]
    clips.mkdir(parents=True)
    (clips / "dia0_utt0.mp4").write_bytes(b"half of it, left by a killed run")
    of_another = clips / "dia0_utt2.mp4"  # as long as that of this archive
    of_another.write_bytes(bytes((raw[0] / FOLDERS["train"] / of_another.name).stat().st_size))
    spec = meld_corpus(outer, scratch=scratch, published=raw[1])
    stamps = {path: path.stat().st_mtime_ns for path in scratch.rglob("*")}
    assert not (clips / "notes.txt").exists(), "neither a clip nor a table"
    shutil.copyfile(raw[0] / FOLDERS["train"] / "notes.txt", clips / "notes.txt")
    meld_corpus(outer, scratch=scratch, published=raw[1])
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items() if path.is_file())
    spec = meld_corpus(outer, scratch=scratch, published=raw[1])
    build(spec, tmp_path / "meld", workers=1, samples_per_shard=12)
    assert hashes(tmp_path / "meld") == hashes(built)


def test_a_folder_of_the_inner_archives_is_taken_too(
    raw: tuple[Path, Published], outer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "MELD.Raw"
    folder.mkdir()
    for split in FOLDERS:
        shutil.copyfile(outer.with_name(f"{split}.tar.gz"), folder / f"{split}.tar.gz")
        shutil.copyfile(raw[0] / TABLES[split], folder / TABLES[split])
    spec = meld_corpus(folder, scratch=tmp_path / "scratch", published=raw[1])
    assert sum(row.clip is not None for split in spec.splits.values() for rows in split for row in rows) == 62
    message = refused(folder, "--out", tmp_path / "out", "--scratch", tmp_path / "scratch", capsys=capsys)
    assert f"train_sent_emo.csv: {4 * len(DIALOGUES['train'])} utterances, MELD has 9989" in message


def test_unpacking_makes_no_link_and_leaves_its_folder_never(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, make in {
        "up": lambda tar: add(tar, "../outside.csv"),
        "link": lambda tar: (link(tar, "there", "/"), add(tar, f"there{tmp_path}/outside.csv")),
    }.items():
        archive = tmp_path / f"{name}.tar.gz"
        with tarfile.open(archive, "w:gz") as tar:
            make(tar)
        message = refused(archive, "--out", tmp_path / "out", "--scratch", tmp_path / "scratch", capsys=capsys)
        assert "do not trust this archive" in message or "holds no train_sent_emo.csv" in message
        assert not (tmp_path / "outside.csv").exists()
        assert not any(path.is_symlink() for path in (tmp_path / "scratch").rglob("*"))


def add(tar: tarfile.TarFile, name: str) -> None:
    member = tarfile.TarInfo(name)
    member.size = 3
    tar.addfile(member, io.BytesIO(b"abc"))


def link(tar: tarfile.TarFile, name: str, target: str) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, target
    tar.addfile(member)


# ------------------------------------------------------------------------------------------------------ the real tables


def test_the_published_tables_give_the_published_numbers(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "meld"
    status, printed, err = run_tool(
        "build_shards", "meld", shared / "data" / "meld", "--out", out, "--text-only", capsys=capsys
    )
    assert status == 0, err
    splits = Corpus.open(out).info["splits"]
    assert {split: one["samples"] for split, one in splits.items()} == {"train": 9989, "dev": 1109, "test": 2610}
    assert {split: one["label_counts"] for split, one in splits.items()} == PUBLISHED
    # The paper counts 1039 training dialogues: their numbers go to 1038, but no row has 60.
    assert {split: one["dialogues"] for split, one in splits.items()} == {"train": 1038, "dev": 114, "test": 280}
    assert {split: len(one["speakers"]) for split, one in splits.items()} == {"train": 260, "dev": 47, "test": 100}
    assert all(one["lacking"] == {"text": 0, "clip": one["samples"], "both": 0} for one in splits.values())
    corpus = Corpus.open(out)
    assert (corpus.mel_mean, corpus.mel_deviation) == (0.0, 1.0)
    faults = corpus.info["faults"]
    assert [(one["key"], one["fault"].partition(":")[0]) for one in faults] == [
        ("test_dia38_004", "the row lasts minutes"),
        ("test_dia155_003", "the row ends when or before it starts"),
        ("test_dia220_000", "the row lasts minutes"),
    ]
    assert all(one["fault"].endswith("(known)") and one["key"] in printed for one in faults)
    first = corpus.split("train").sample(0)
    assert first.text == "also I was the point person on my company’s transition from the KL-5 to GR-6 system."
    assert (first.meta["start"], first.meta["end"]) == (976.059, 981.731)


def test_the_known_faults_are_of_rows_that_meld_has(shared: Path) -> None:
    content = yaml.safe_load(Path(meld.__file__).with_name("meld_faults.yaml").read_text(encoding="utf-8"))
    spec = meld_corpus(shared / "data" / "meld", text_only=True)
    rows = {
        f"{split} {row.dialogue.removeprefix(f'{split}_')}_utt{row.turn}"
        for split, dialogues in spec.splits.items()
        for dialogue in dialogues
        for row in dialogue
    }
    for entry in content["known"]:
        assert f"{entry['split']} {entry['clip']}" in rows
        assert entry["kind"] in content["kinds"]


# ------------------------------------------------------------------------------------------------------------ bad input


def test_what_is_not_meld_is_refused_in_one_line(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.tar.gz").write_bytes(b"no archive")
    cases = {
        tmp_path / "nowhere": "no such file or folder",
        tmp_path / "empty": "holds no train_sent_emo.csv; give MELD.Raw.tar.gz or the folder MELD.Raw",
        copy / TABLES["dev"]: "holds no train_sent_emo.csv",
        tmp_path / "a.tar.gz": "damaged or incomplete",
    }
    for path, said in cases.items():
        message = refused(path, "--out", out, capsys=capsys)
        assert message.startswith(str(path))
        assert said in message
    (copy / "old").mkdir()
    shutil.copyfile(copy / TABLES["dev"], copy / "old" / TABLES["dev"])
    with (copy / "old" / TABLES["dev"]).open("a") as file:
        file.write("17\n")
    assert "MELD has 9989" in refused(copy, "--out", out, capsys=capsys), "the one that is less deep is meant"
    (copy / TABLES["dev"]).rename(copy / "dev.csv")
    (copy / "new").mkdir()
    shutil.copyfile(copy / "dev.csv", copy / "new" / TABLES["dev"])
    assert "give the folder of one of the two" in refused(copy, "--out", out, capsys=capsys)
    shutil.copyfile(copy / "dev.csv", copy / "old" / TABLES["dev"])
    assert "MELD has 9989" in refused(copy, "--out", out, capsys=capsys), "two of the same are one"
    shutil.rmtree(copy / FOLDERS["test"])
    message = refused(copy, "--out", out, capsys=capsys)
    assert "holds no output_repeated_splits_test" in message
    assert "or --text-only" in message
    assert not out.exists()


def edit(table: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    with table.open(newline="", encoding="utf-8") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    change(rows)
    write_table(table, rows)


def test_a_table_of_another_release_is_named_with_what_differs(
    raw: tuple[Path, Published], copy: Path, tmp_path: Path
) -> None:
    table = copy / TABLES["dev"]
    original = table.read_bytes()

    def message() -> str:
        with pytest.raises(UserError) as caught:
            meld_corpus(copy, published=raw[1])
        table.write_bytes(original)
        assert str(caught.value).startswith(str(table))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    counts = raw[1]["dev"]
    with table.open(newline="", encoding="utf-8") as file:
        label = next(csv.DictReader(file))["Emotion"]
    edit(table, lambda rows: rows.pop(0))
    assert f": 15 utterances, MELD has 16 ({counts[label] - 1} {label} for {counts[label]})" in message()
    edit(table, lambda rows: [row.pop("Season") for row in rows])
    assert "no column 'Season', so this is no CSV of MELD" in message()
    edit(table, lambda rows: rows[3].update(Emotion="calm"))
    assert "row 5: emotion 'calm' is none of MELD's" in message()
    edit(table, lambda rows: rows[3].update(Dialogue_ID="x"))
    assert "row 5: Dialogue_ID 'x' is not a whole number" in message()
    edit(table, lambda rows: rows[3].update(StartTime=""))
    assert "row 5: no StartTime" in message()
    edit(table, lambda rows: rows[3].update(EndTime="soon"))
    assert "row 5: 'soon' is no time" in message()
    table.write_bytes(original.decode().encode("utf-16"))
    assert "not UTF-8 text" in message()
    table.write_bytes(original.decode().encode("cp1252"))
    curly = [len(re.findall("[’“”…]", line)) for line in original.decode().splitlines()]
    (fault,) = (one.fault for one in meld_corpus(copy, published=raw[1]).faults if one.file == table.name)
    assert fault == f"texts in a broken encoding: {sum(curly)} in {np.count_nonzero(curly)} rows (new)"


def test_a_folder_with_few_of_its_clips_is_not_taken_for_a_faulty_one(raw: tuple[Path, Published], copy: Path) -> None:
    for number in range(8):
        (copy / FOLDERS["train"] / f"dia{number}_utt3.mp4").unlink()
    with pytest.raises(UserError, match=r"8 of the 36 clips that train_sent_emo\.csv lists are missing") as caught:
        meld_corpus(copy, published=raw[1])
    assert "unpack the archive again, or give --text-only" in str(caught.value)


def limit_file_size() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))


def test_a_full_disk_ends_the_unpacking_in_one_line(outer: Path, tmp_path: Path) -> None:
    tool = Path(__file__).parents[1] / "tools" / "build_shards.py"
    command = [sys.executable, str(tool), "meld", str(outer), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit_file_size)
    assert done.returncode == 2
    *unpacking, error = done.stderr.splitlines()
    assert all(line.startswith("unpacking ") for line in unpacking)
    assert f"{tmp_path / 'out.raw'}" in error
    assert "make room and run the same command again" in error


# ---------------------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize(
    ("broken", "mended", "replacements"),
    [
        ("don\x92t\x85 \x93no\x94", "don’t… “no”", 4),
        ("donâ€™t", "don’t", 1),
        ("donâ\x80\x99t", "don’t", 1),
        ("â€œYesâ€\x9d", "“Yes”", 2),
        ("cafÃ© garÃ§on", "café garçon", 2),
        ("Ã¢â‚¬â„¢", "’", 4),  # twice
        ("donÂ’t", "don’t", 2),
        ("lost � stays", "lost � stays", 0),
        ("\x81", "\x81", 0),
    ],
)
def test_broken_encodings_are_mended_and_counted(broken: str, mended: str, replacements: int) -> None:
    assert repair(broken) == (mended, replacements)


def test_every_text_of_meld_survives_and_comes_back_from_either_misreading(shared: Path) -> None:
    for name in TABLES.values():
        text = (shared / "data" / "meld" / name).read_bytes().decode()
        assert repair(text) == (text, 0)
        assert repair(text.encode().decode("latin-1"))[0] == text
        assert repair(text.encode("cp1252").decode("latin-1"))[0] == text


@given(st.text(st.sampled_from("abzABZ ,.!?'\"éèçñöüßÉÖÄ’‘“”…—–€«»")))
def test_good_text_is_left_alone(text: str) -> None:
    assert repair(text) == (text, 0)


def test_the_counts_that_are_asserted_are_the_published_ones() -> None:
    assert {split: sum(counts.values()) for split, counts in PUBLISHED.items()} == {
        "train": 9989,
        "dev": 1109,
        "test": 2610,
    }
    assert Counter(PUBLISHED["train"]).most_common(1) == [("neutral", 4710)]
