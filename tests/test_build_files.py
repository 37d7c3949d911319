import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from corpus_helpers import build_here, hashes, run_tool, tone, write_clip
from distributed import run_ranks
from release_fixtures import make_ravdess, train_each

from jointfuse.data.build import build
from jointfuse.data.corpora.descriptions import SHIPPED, read_description
from jointfuse.data.corpora.files import files_corpus
from jointfuse.data.shards import Corpus
from jointfuse.data.verify import verify
from jointfuse.errors import UserError

pytestmark = pytest.mark.required
Refused = Callable[..., str]
DESCRIPTION = {
    "pattern": r"(?P<speaker>\w+?)_(?P<label>[a-z]+)_(?P<text>\d)\.wav",
    "labels": {"ang": "anger", "joy": "joy"},
    "texts": {"1": "It is eleven o'clock.", "2": "The bus is late."},
    "splits": {"train": ["ann", "bob"], "dev": ["cid"]},
}


@pytest.fixture(scope="module")
def ravdess(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout of the archive, 24 actors, with every fault once."""
    root = make_ravdess(tmp_path_factory.mktemp("ravdess"))
    first = root / "Actor_01"
    write_clip(first / "03-02-01-01-01-01-01.wav")  # a song
    write_clip(first / "01-01-01-01-01-01-01.wav")  # of a film
    write_clip(first / "03-01-09-01-01-01.wav")  # a part short
    (first / "._03-01-01-01-01-01-01.wav").write_bytes(b"\x00\x05\x16\x07")
    (first / "03-01-02-01-01-01-01.wav").write_bytes(b"")
    (first / "03-01-03-01-01-01-01.wav").write_bytes(b"RIFF, but no more")
    (root / "copy").mkdir()
    shutil.copy(first / "03-01-04-01-01-01-01.wav", root / "copy")
    (root / "README.txt").write_text("not a clip")
    return root


@pytest.fixture(scope="module")
def built(ravdess: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "ravdess"
    build(files_corpus(ravdess, read_description("ravdess"), "ravdess"), out, workers=2)
    return out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """mine.yaml and the clips of three speakers."""
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(DESCRIPTION), encoding="utf-8")
    for number, name in enumerate(
        f"{who}_{what}_{text}" for who in ("ann", "bob", "cid") for what in ("ang", "joy") for text in "12"
    ):
        write_clip(tmp_path / "clips" / f"{name}.wav", pitch=200 + 20 * number)
    return tmp_path


def describe(folder: Path, **changes: object) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({**DESCRIPTION, **changes}), encoding="utf-8")
    return path


@pytest.fixture
def refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Builds `folder`; exit status 2 and one line, which is returned."""

    def run(raw: Path = folder / "clips", description: object = folder / "mine.yaml") -> str:
        out = folder / "out"
        status, _, err = run_tool("build_shards", "files", description, raw, "--out", out, capsys=capsys)
        assert status == 2
        (line,) = [line for line in err.splitlines() if not line.startswith("building ")]
        assert line.startswith("error: ")
        assert not (out / "corpus.json").exists()
        return line

    return run


def test_a_description_of_ten_lines_builds_a_corpus(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "out"
    arguments = ("files", folder / "mine.yaml", folder / "clips", "--out", out, "--workers", 1)
    status, said, err = run_tool("build_shards", *arguments, capsys=capsys)
    assert status == 0, err
    assert "train: 8 utterances, 8 dialogues" in said
    corpus = Corpus.open(out)
    assert corpus.labels == ["anger", "joy"]
    assert corpus.splits == ["train", "dev"]
    sample = corpus.split("dev").sample(3)
    assert (sample.text, sample.speaker, sample.meta["emotion"], sample.turn) == ("The bus is late.", "cid", "joy", 0)
    assert sample.dialogue == "cid_joy_2"
    assert not verify(out, workers=1).faults


def test_ravdess_as_the_archive_unpacks_is_built_and_every_fault_named(ravdess: Path, built: Path) -> None:
    corpus = Corpus.open(built)
    faults = {(fault["file"], fault["fault"]) for fault in corpus.info["faults"]}
    assert faults == {
        ("Actor_01/._03-01-01-01-01-01-01.wav", "left behind by another system"),
        ("Actor_01/03-01-09-01-01-01.wav", "named otherwise than the pattern says"),
        ("Actor_01/03-02-01-01-01-01-01.wav", "channel 02 is not kept"),
        ("Actor_01/01-01-01-01-01-01-01.wav", "modality 01 is not kept"),
        ("Actor_01/03-01-02-01-01-01-01.wav", "an empty file"),
        ("Actor_01/03-01-03-01-01-01-01.wav", "no sound that can be read"),
        ("copy/03-01-04-01-01-01-01.wav", "copied from elsewhere in the folder"),
    }
    assert all(fault["done"] == "left out" for fault in corpus.info["faults"])
    rows = corpus.info["rows"]
    assert {split: counts["read"] for split, counts in rows.items()} == {"train": 254, "dev": 32, "test": 96, "": 7}
    assert sum(counts["read"] for counts in rows.values()) == len(list(ravdess.rglob("*.wav")))
    assert sum(rows[""].values()) == 2 * rows[""]["read"]
    assert {split: len(corpus.split(split)) for split in corpus.splits} == {"train": 254, "dev": 32, "test": 96}
    assert corpus.info["splits"]["dev"]["speakers"] == ["17", "18"]
    sample = corpus.split("test").sample(0)
    assert sample.text == "Kids are talking by the door"
    assert sample.meta["intensity"] == "01"
    assert sample.waveform is not None
    assert len(sample.waveform) < 16_000
    assert not verify(built, workers=1).faults


def test_the_corpus_trains(built: Path, tmp_path: Path) -> None:
    (losses,) = run_ranks(1, train_each, tmp_path / "ranks", {"ravdess": built}, tmp_path)
    assert losses["ravdess"].shape == (20, 3)
    assert np.isfinite(losses["ravdess"]).all()


def test_the_1200_clips_of_twenty_actors_are_built(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ravdess"
    status, said, err = run_tool("build_shards", "ravdess", shared / "data" / "ravdess", "--out", out, capsys=capsys)
    assert status == 0, err
    assert "train: 960 utterances" in said
    assert "fault" not in said
    corpus = Corpus.open(out)
    assert [len(corpus.split(split)) for split in ("train", "dev", "test")] == [960, 120, 120]
    speakers = [set(corpus.info["splits"][split]["speakers"]) for split in corpus.splits]
    assert sum(map(len, speakers)) == len(set.union(*speakers)) == 20
    counts = [sum(corpus.info["splits"][s]["label_counts"][label] for s in corpus.splits) for label in corpus.labels]
    assert counts == [80, *[160] * 7]


def test_emodb_and_nemo_are_read_from_their_names_and_tables(tmp_path: Path) -> None:
    for number, name in enumerate(("03a01Fa", "08b10Wc", "12a05Nb", "16b03Ta")):
        write_clip(tmp_path / "emodb" / "wav" / f"{name}.wav", pitch=200 + number)
    splits = files_corpus(tmp_path / "emodb", read_description("emodb"), "x").splits
    (first,), (second,) = splits["train"]
    assert (first.speaker, first.label, first.text) == ("03", 5 - 1, "Der Lappen liegt auf dem Eisschrank.")
    assert second.text.startswith("Die wird auf dem Platz sein")
    assert [len(splits[split]) for split in ("dev", "test")] == [1, 1]
    rows = ["file_id\temotion\traw_text\tnormalized_text\tspeaker_id\tgender\tage"]
    for number, (who, what) in enumerate((("WR0", "surprised"), ("KD0", "anger"), ("TP0", "fear"), ("TP0", "sadness"))):
        write_clip(tmp_path / "nemo" / "samples" / f"{who}_{what}_6{number}.wav", pitch=200 + number)
        rows.append(f"{who}_{what}_6{number}.wav\t{what}\t„Zdanie” {number}.\tzdanie {number}\t        {who}\tmale\t23")
    rows[-1] = rows[-1].replace("TP0_sadness_63", "TP0_sadness_64")
    (tmp_path / "nemo" / "data.tsv").write_text("\n".join(rows), encoding="utf-8")
    spec = files_corpus(tmp_path / "nemo", read_description("nemo"), "x")
    assert spec.splits["train"][0][0].text == "„Zdanie” 0."
    assert spec.labels[spec.splits["train"][0][0].label] == "surprised"
    assert [len(spec.splits[split]) for split in ("train", "dev", "test")] == [1, 1, 1]
    assert [(fault.file, fault.fault) for fault in spec.faults] == [
        ("samples/TP0_sadness_63.wav", "not in the table"),
        ("data.tsv", "1 row(s) without a file (TP0_sadness_64.wav)"),
    ]


def test_every_shipped_description_is_a_command_and_gives_each_speaker_one_split(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in SHIPPED:
        described = read_description(name)
        assert list(described.splits) == ["train", "dev", "test"]
        status, said, _ = run_tool("build_shards", name, "--help", capsys=capsys)
        assert status == 0
        assert f"files {name}" in said


def test_labels_may_be_folders_and_without_splits_all_is_train(tmp_path: Path) -> None:
    for number, label in enumerate(("happy", "sad")):
        write_clip(tmp_path / "TESS" / label / "1.wav", pitch=200 + 50 * number)
    path = tmp_path / "tess.yaml"
    path.write_text("pattern: '(?P<label>\\w+)/\\d\\.wav'\nlabels: {happy: joy, sad: sadness}\n", encoding="utf-8")
    spec = files_corpus(tmp_path / "TESS", read_description(path), "x")
    assert [(rows[0].dialogue, rows[0].label, rows[0].text) for rows in spec.splits["train"]] == [
        ("happy/1", 0, ""),
        ("sad/1", 1, ""),
    ]


def test_the_same_files_elsewhere_give_the_same_bytes(folder: Path) -> None:
    moved = Path(shutil.copytree(folder / "clips", folder / "elsewhere" / "deeper"))
    described = read_description(folder / "mine.yaml")
    for raw, out in ((folder / "clips", "a"), (moved.parent, "b")):
        build(files_corpus(raw, described, "mine"), folder / out, workers=1)
    assert hashes(folder / "a") == hashes(folder / "b")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lables": {}}, "no entry 'lables', did you mean 'labels'?"),
        ({"table": {"file": "a.tsv", "kye": "x", "columns": {}}}, "no entry 'kye', did you mean 'key'?"),
        ({"pattern": "(?P<label"}, "pattern: is no regular expression: missing >"),
        ({"pattern": "(?i)(?P<label>a)"}, "pattern: is no regular expression: global flags not at the start"),
        ({"pattern": r"(?P<speaker>\w)_\w+\.wav"}, "pattern has no group (?P<label>...)"),
        ({"pattern": r"(?P<label>\w+)_(?P<text>\d)\.wav"}, "pattern has no group (?P<speaker>...)"),
        ({"pattern": r"(?P<turn>\w)(?P<label>\w)(?P<text>\d)(?P<speaker>\d)"}, "'turn' is a name the builder uses"),
        ({"keep": {"speeker": ["ann"]}}, "keep: no group 'speeker', did you mean 'speaker'?"),
        ({"labels": ["anger", "joy"]}, "labels: Input should be a valid dictionary"),
        ({"labels": {"ang": "anger", "joy": "anger"}}, "only one class, 'anger'"),
        ({"splits": {"train": ["ann", "bob"], "dev": ["ann"]}}, "speaker 'ann' is listed twice"),
        ({"splits": {"training": ["ann"]}}, "splits.training"),
        ({"splits": {"train": []}}, "splits.train: Value should have at least 1 item"),
        ({"splits": {"train": ["ann"], "dev": ["bob"]}}, "speaker 'cid' is in no split; add it to one"),
        ({"splits": {"train": ["ann", "bob", "cid"], "dev": ["dan"]}}, "split 'dev' has no utterances"),
        ({"labels": {"ang": "anger"}}, "ann_joy_1.wav: label 'joy' is not among the labels described (ang)"),
        ({"texts": {"1": "One."}}, "text '2' is not among the texts described (1)"),
        ({"pattern": r"(?P<speaker>\d)-(?P<label>\d)-(?P<text>\d)\.wav"}, "none of its 12 sound files is named as the"),
        ({"keep": {"label": ["sad"]}}, "nothing is left to build from: 6 files: label ang is not kept"),
        ({"table": {"file": "a.tsv", "key": "x", "columns": {"age": "age"}}}, "a.tsv: no such table"),
    ],
)
def test_a_wrong_description_is_refused_in_one_line(
    folder: Path, refused: Refused, changes: dict[str, object], says: str
) -> None:
    describe(folder, **changes)
    assert says in refused()


def test_a_folder_that_does_not_fit_is_refused_in_one_line(folder: Path, refused: Refused) -> None:
    clips = folder / "clips"
    assert "mine.yaml: a file; unpack it and give the folder" in refused(folder / "mine.yaml")
    assert "nowhere: no such folder" in refused(folder / "nowhere")
    (folder / "empty").mkdir()
    assert "no sound file (.wav, .flac" in refused(folder / "empty")
    (folder / "empty" / "Speech.zip").write_bytes(b"PK")
    assert "unpack Speech.zip first" in refused(folder / "empty")
    line = refused(description="radvess")
    assert "radvess: cannot be read (No such file or directory); give a YAML file" in line
    assert "or one of emodb, nemo" in line
    (folder / "bad.yaml").write_text("pattern: [")
    assert "bad.yaml line 1: not valid YAML" in refused(description=folder / "bad.yaml")
    (folder / "bad.yaml").write_text("- pattern")
    assert "at least pattern and labels" in refused(description=folder / "bad.yaml")
    (folder / "bad.yaml").write_text("pattern: x")
    assert "bad.yaml: the entry labels is missing: what the group" in refused(description=folder / "bad.yaml")
    soundfile.write(clips / "ann_ang_1.flac", tone(0.1), 16_000)
    describe(folder, pattern=DESCRIPTION["pattern"].replace("wav", "(wav|flac)"))  # type: ignore[attr-defined]
    assert "ann_ang_1.wav: has the name of" in refused()
    (clips / "ann_ang_1.flac").unlink()
    table = {"file": "t.tsv", "key": "file", "columns": {"age": "age"}}
    describe(folder, table=table)
    (clips / "t.tsv").write_text("file\tgae\nann_ang_1\t3\n")
    assert "t.tsv: no column 'age', did you mean 'gae'?; mend `table`" in refused()
    (clips / "t.tsv").write_text("file\tage\nann_ang_1\t3\nann_ang_1\t4\n")
    assert "t.tsv row 3: 'ann_ang_1' has a row already" in refused()


def test_a_clip_that_cannot_be_decoded_is_left_out_and_named(folder: Path, refused: Refused) -> None:
    spoilt = [folder / "clips" / f"cid_{name}.wav" for name in ("joy_2", "joy_1", "ang_1", "ang_2")]
    soundfile.write(spoilt[0], np.full(1600, np.nan), 16_000, subtype="FLOAT")
    build_here(files_corpus(folder / "clips", read_description(folder / "mine.yaml"), "mine"), folder / "built")
    corpus = Corpus.open(folder / "built")
    assert corpus.info["faults"] == [
        {
            "split": "dev",
            "key": None,
            "file": "cid_joy_2.wav",
            "fault": "holds values that are not numbers (NaN or infinity)",
            "done": "left out",
        }
    ]
    assert [corpus.split("dev").sample(i).dialogue for i in range(3)] == ["cid_ang_1", "cid_ang_2", "cid_joy_1"]
    assert len(corpus.split("dev")) == 3
    assert not verify(folder / "built", workers=1).faults
    for path in spoilt[1:]:
        shutil.copy(spoilt[0], path)
    assert "out/dev: every clip was left out, the last because it holds values that are not numbers" in refused()


def test_numbers_need_no_quotes_and_ranges_keep_their_zeros(folder: Path) -> None:
    path = folder / "numbers.yaml"
    path.write_text(
        "pattern: '(?P<speaker>..)(?P<label>..)'\nlabels: {01: a, 08: b, no: c}\n"
        "splits: {train: 08-11, dev: [01, 03-04]}\n"
    )
    described = read_description(path)
    assert list(described.labels) == ["01", "08", "no"]
    assert described.splits == {"train": ["08", "09", "10", "11"], "dev": ["01", "03", "04"]}


def test_a_description_of_one_of_the_shipped_names_is_found_without_a_path() -> None:
    with pytest.raises(UserError, match="or one of emodb, nemo, ravdess"):
        read_description("tess")
    assert read_description("ravdess").labels["01"] == "neutral"
