import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from corpus_helpers import build_here, run_tool
from distributed import run_ranks
from release_fixtures import make_iemocap, train_each

from jointfuse.data.build import build
from jointfuse.data.corpora.iemocap import LABELS, VIEWS, iemocap_corpus, read_release
from jointfuse.data.corpora.iemocap_counts import PUBLISHED, TABULATED, check_counts, describe_counts
from jointfuse.data.index import UNLABELLED
from jointfuse.data.shards import Corpus
from jointfuse.data.verify import verify
from jointfuse.errors import UserError

pytestmark = pytest.mark.required
COUNTS = {"hap": 12, "sad": 13, "neu": 20, "ang": 11, "exc": 8, "fru": 9, "sur": 3, "fea": 1, "xxx": 6}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sound, of 83 turns in 11 dialogues."""
    return make_iemocap(tmp_path_factory.mktemp("iemocap"), COUNTS)


@pytest.fixture
def copy(release: Path, tmp_path: Path) -> Path:
    """To be spoilt."""
    return Path(shutil.copytree(release, tmp_path / "IEMOCAP_full_release"))


@pytest.fixture(scope="module")
def faulty(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every fault once, in dialogues of their own where they must not meet."""
    root = Path(shutil.copytree(release, tmp_path_factory.mktemp("faulty") / "IEMOCAP_full_release"))
    first, third = root / "Session1", root / "Session3"
    transcript = first / "dialog" / "transcriptions" / "Ses01F_impro01.txt"
    lines = transcript.read_text().splitlines()
    lines = [line for line in lines if not line.startswith("Ses01F_impro01_M000")]
    lines += ["M: Hm.", "Ses01F_impro01_MXX0 [030.0-031.0]: Right.", "BREATHING", lines[0]]
    transcript.write_text("\n".join(lines))
    for folder in (transcript.parent, first / "dialog" / "EmoEvaluation"):
        (folder / "._Ses01F_impro01.txt").write_bytes(b"\x00\x05\x16\x07")
    (first / "dialog" / "EmoEvaluation" / "Ses01F_impro01.pk").write_bytes(b"\x80")
    (first / "dialog" / "EmoEvaluation" / "Ses01F_impro99.txt").write_text("")
    (first / "dialog" / "EmoEvaluation" / "Categorical").mkdir()
    (first / "dialog" / "EmoEvaluation" / "Categorical" / "Ses01F_impro01_e2_cat.txt").write_text("x :Neutral; ()")
    wavs = third / "sentences" / "wav" / "Ses03F_impro01"
    (wavs / "Ses03F_impro01_F000.wav").unlink()
    (wavs / "Ses03F_impro01_F001.wav").write_bytes(b"")
    (wavs / "Ses03F_impro01_F002.wav").write_bytes(b"RIFF, but no more")
    shutil.copy(wavs / "Ses03F_impro01_M000.wav", wavs / "Ses03F_impro01_MXX0.wav")
    (wavs / "._Ses03F_impro01_M000.wav").write_bytes(b"\x00\x05\x16\x07")
    return root


@pytest.fixture(scope="module")
def built(faulty: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The view of all labels, faults and all."""
    out = tmp_path_factory.mktemp("built") / "iemocap"
    build(iemocap_corpus(read_release(faulty), "iemocap", "all"), out, workers=2, samples_per_shard=20)
    return out


def edit(path: Path, pattern: str, by: str) -> None:
    text, count = re.subn(pattern, by, path.read_text(), count=1)
    assert count == 1
    path.write_text(text)


def test_turns_are_in_the_order_they_are_spoken_and_their_speaker_is_the_letter_at_the_end(release: Path) -> None:
    turns = [turn for turn in read_release(release).turns if turn.dialogue == "Ses01F_impro01"]
    assert [turn.name.rpartition("_")[2] for turn in turns[:4]] == ["F000", "M000", "F001", "M001"]
    assert [turn.speaker for turn in turns[:2]] == ["Ses01F", "Ses01M"]
    assert [turn.number for turn in turns] == list(range(8))
    assert turns[0].attributes == (2.5, 3.0, 3.5)
    assert (turns[1].start, turns[1].end) == (3.5, 5.7)
    women = {turn.speaker for turn in read_release(release).turns if turn.dialogue.startswith("Ses02M")}
    assert women == {"Ses02F", "Ses02M"}


def test_a_view_joins_labels_or_takes_them_away_and_keeps_every_turn(release: Path) -> None:
    read = read_release(release)
    sizes = {}
    for view in VIEWS:
        spec = iemocap_corpus(read, "x", view)
        rows = [row for split in spec.splits.values() for dialogue in split for row in dialogue]
        sizes[view] = sum(row.label is not None for row in rows)
        assert len(rows) == 83
        number = {turn.name: turn.number for turn in read.turns}
        assert all(row.turn == number[Path(row.clip).stem] for row in rows)
        counts = Counter(spec.labels[row.label] for row in rows if row.label is not None)
        for label in spec.labels:
            assert counts[label] == sum(COUNTS.get(code, 0) for code, name in VIEWS[view].items() if name == label)
    assert sizes == {"six": 73, "four": 64, "all": 83}
    assert iemocap_corpus(read, "x", "four").labels == ["angry", "happy", "sad", "neutral"]
    assert iemocap_corpus(read, "x").labels == ["happy", "sad", "neutral", "angry", "excited", "frustrated"]


def test_one_session_is_the_test_and_dev_is_a_share_of_every_other_or_a_session(release: Path) -> None:
    read = read_release(release)

    def dialogues(**options: float) -> dict[str, set[str]]:
        splits = iemocap_corpus(read, "x", "all", **options).splits  # type: ignore[arg-type]
        return {split: {rows[0].dialogue for rows in content} for split, content in splits.items()}

    shared = dialogues(test_session=2)
    assert {name[:5] for name in shared["test"]} == {"Ses02"}
    assert Counter(name[:5] for name in shared["dev"]) == {"Ses01": 1, "Ses03": 1, "Ses04": 1, "Ses05": 1}
    assert sum(map(len, shared.values())) == len(set.union(*shared.values())) == 11
    by_session = dialogues(test_session=5, dev=4)
    assert {name[:5] for name in by_session["dev"]} == {"Ses04"}
    assert {name[:5] for name in by_session["train"]} == {"Ses01", "Ses02", "Ses03"}
    four = iemocap_corpus(read, "x", "four", 2).splits
    assert {rows[0].dialogue for rows in four["dev"]} <= shared["dev"]


def test_every_planted_fault_is_named_and_treated_and_the_corpus_is_sound(built: Path) -> None:
    corpus = Corpus.open(built)
    faults = {(fault["file"].removeprefix("Session"), fault["fault"]) for fault in corpus.info["faults"]}
    spoken, wavs = "1/dialog/transcriptions", "3/sentences/wav"
    assert faults == {
        (f"{spoken}/Ses01F_impro01.txt", "1 line(s) name a speaker but no turn"),
        (f"{spoken}/Ses01F_impro01.txt", "1 line(s) are no transcript"),
        (f"{spoken}/Ses01F_impro01.txt", "Ses01F_impro01_F000: transcribed twice"),
        ("1/dialog/EmoEvaluation/Ses01F_impro01.txt", "Ses01F_impro01_M000: no transcript"),
        ("1/dialog/EmoEvaluation/Ses01F_impro99.txt", "no turn in it"),
        (spoken, "1 transcript(s) of no labelled turn (Ses01F_impro01_MXX0)"),
        (f"{wavs}/Ses03F_impro01/Ses03F_impro01_F000.wav", "no clip"),
        (f"{wavs}/Ses03F_impro01/Ses03F_impro01_F001.wav", "an empty file"),
        (f"{wavs}/Ses03F_impro01/Ses03F_impro01_F002.wav", "no sound that can be read"),
        (wavs, "1 clip(s) of no labelled turn (Ses03F_impro01_MXX0)"),
    }
    samples = {
        split: [corpus.split(split).sample(i) for i in range(len(corpus.split(split)))] for split in corpus.splits
    }
    every = [sample for content in samples.values() for sample in content]
    assert len(every) == 83 - 1
    assert 1 not in [sample.turn for sample in every if sample.dialogue == "Ses01F_impro01"]
    silent = [sample for sample in every if sample.waveform is None]
    assert [sample.turn for sample in silent] == [0, 2, 4], "they are heard by their text, by the turns behind them"
    assert {(sample.dialogue, sample.label) for sample in silent} == {("Ses03F_impro01", UNLABELLED)}
    assert all(sample.text for sample in every)
    assert [every[0].meta[name] for name in ("valence", "arousal", "dominance")] == [2.5, 3.0, 3.5]
    homes = {sample.dialogue: split for split, content in samples.items() for sample in content}
    for fault in corpus.info["faults"]:
        of_a_turn = fault["file"].endswith(".wav") or fault["fault"].startswith("Ses01F_impro01_")
        assert fault["split"] == (homes[re.findall(r"Ses0\d._impro\d\d", fault["file"])[0]] if of_a_turn else "")
    assert not verify(built, workers=1).faults


def test_the_corpus_trains(built: Path, tmp_path: Path) -> None:
    (losses,) = run_ranks(1, train_each, tmp_path / "ranks", {"iemocap": built}, tmp_path)
    assert losses["iemocap"].shape == (20, 3)
    assert np.isfinite(losses["iemocap"]).all()


def test_the_published_counts_are_those_of_the_literature() -> None:
    assert sum(PUBLISHED.values()) == 10_039
    assert sum(PUBLISHED[code] for code in VIEWS["four"]) == 5531
    assert sum(PUBLISHED[code] for code in VIEWS["six"]) == 7380
    assert [sum(part) for part in zip(*TABULATED.values(), strict=True)] == [5810, 1623]
    assert TABULATED.keys() == VIEWS["six"].keys()


def test_the_command_counts_a_whole_release_and_says_where_the_two_figures_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_iemocap(tmp_path, PUBLISHED, each=67, clips=1)
    command = ("build_shards", "iemocap", root, "--out", tmp_path / "out", "--partial")
    status, said, err = run_tool(*command, capsys=capsys)
    assert status == 0, err
    assert "label files: 10039 turns in 150 dialogues: happy 595, sad 1084" in said
    assert "four classes, excited joined into happy: 5531, published 5531" in said
    assert "six classes: 7380; the literature has 7380 (majority labels) and 7433" in said
    assert "not of the view 'six', kept without a label as context of the others: 2659 turns (undecided 2507" in said
    assert "without a usable clip, kept without a label as context: 9889 turns" in said
    assert "left out: 0 turns without a transcript" in said
    corpus = Corpus.open(tmp_path / "out")
    assert len(corpus.info["faults"]) == 9889 + 5, "and a line for the clips of each session"
    assert sum(len(corpus.split(split)) for split in corpus.splits) == 10_039


def test_the_turns_that_could_make_the_larger_figure_are_counted_from_the_evaluators_votes(copy: Path) -> None:
    path = copy / "Session5" / "dialog" / "EmoEvaluation" / "Ses05F_impro01.txt"
    for code, votes in (
        ("xxx", "Happiness Excited Sadness"),
        ("xxx", "Happiness Sadness Sadness Fear Fear"),
        ("xxx", "Anger Sadness Fear"),
        ("oth", "Happiness Other Other"),
    ):
        name = f"Ses05F_impro01_F1{path.stat().st_size}"
        block = "".join(f"C-E{number}:\t{vote};\t()\n" for number, vote in enumerate(votes.split(), 1))
        path.write_text(
            f"{path.read_text()}\n\n[90.0 - 91.0]\t{name}\t{code}\t[2.0, 2.0, 2.0]\n{block}C-M1:\tHappiness;\t()\n"
        )
    release = read_release(copy)
    release.turns[:] = [turn for turn in release.turns if turn.start == 90.0]
    lines = describe_counts(release, "six")
    start = next(number for number, line in enumerate(lines) if line.startswith("  happy:"))
    assert lines[start].startswith("  happy: 0 + 0 by majority in sessions 1 to 4 and 5, 504 + 144 in the larger")
    assert [line.split(" turns ")[0].strip() for line in lines[start + 1 : start + 6]] == [
        "0 + 2",  # a vote for it
        "0 + 1",  # none more often
        "0 + 1",  # happy or excited by more than half
        "0 + 1",  # another label, outside the six
        "0 + 0",  # another of the six
    ]


def test_counts_other_than_the_published_ones_are_refused_with_what_differs(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read = read_release(release)
    check_counts(read, COUNTS)
    assert describe_counts(read, "four", COUNTS)[1].endswith("happy: 64, published 64")
    with pytest.raises(UserError, match=r"give 64 turns in four classes, published are 65 \(happy 12 of 13\)"):
        check_counts(read, COUNTS | {"hap": 13})
    status, _, err = run_tool("build_shards", "iemocap", release, "--out", tmp_path / "out", capsys=capsys)
    assert status == 2
    assert err.count("\n") == 1
    assert "published are 5531 (angry 11 of 1103, happy 12 of 595" in err
    assert not (tmp_path / "out").exists()


LABEL_FILE = "Session2/dialog/EmoEvaluation/Ses02F_impro01.txt"


@pytest.mark.parametrize(
    ("pattern", "by", "says"),
    [
        (r"\[1\.0", "[1.0.", r"line 3: not of the form"),
        (r"\[1\.0", "[one", r"Ses02F_impro01.txt line 3: not of the form \[START - END\] TURN LABEL \[V, A, D\]"),
        ("\t[a-z]{3}\t", "\tjoy\t", "line 3: unknown label 'joy'; known: hap, sad"),
        ("Ses02F_impro01_F000", "Ses02F_impro02_F000", "turn Ses02F_impro02_F000 is of another dialogue"),
        ("Ses02F_impro01_F001", "Ses02F_impro01_F000", "turn Ses02F_impro01_F000 is labelled a second time"),
        ("\n\n\\[6", "\n[6", "two summary lines in one block"),
    ],
)
def test_a_damaged_label_file_is_refused_with_its_line(copy: Path, pattern: str, by: str, says: str) -> None:
    edit(copy / LABEL_FILE, pattern, by)
    with pytest.raises(UserError, match=says):
        read_release(copy)


def test_what_is_no_release_is_said_in_one_line(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(raw: Path, *options: object) -> str:
        status, _, err = run_tool("build_shards", "iemocap", raw, "--out", copy.parent / "out", *options, capsys=capsys)
        assert status == 2
        assert err.count("\n") == 1
        return err

    assert "no such view; choose six, four, all" in refused(copy, "--view", "seven")
    assert "IEMOCAP has sessions 1 to 5" in refused(copy, "--test-session", 6)
    assert "a session other than the one of the test" in refused(copy, "--dev", 5)
    assert "unpack the archive and give the folder" in refused(copy / LABEL_FILE)
    shutil.move(copy / LABEL_FILE, copy / "Session1" / "dialog" / "EmoEvaluation" / "Ses02F_impro01.txt")
    assert "no dialogue of session 1; the sessions are mixed up" in refused(copy)
    assert "no folder Session1 to Session5; give IEMOCAP_full_release, unpacked" in refused(copy / "Session1")


def test_labels_are_named_once_each() -> None:
    assert len(set(LABELS.values())) == len(LABELS) == 11


def test_a_turn_whose_clip_does_not_decode_is_heard_by_its_text_and_in_no_way_trained_on(
    copy: Path, tmp_path: Path
) -> None:
    name = "Ses01F_impro01_M001"
    soundfile.write(
        copy / "Session1" / "sentences" / "wav" / "Ses01F_impro01" / f"{name}.wav",
        np.full(9_000, np.nan, dtype=np.float32),
        16_000,
        subtype="FLOAT",
    )
    build_here(iemocap_corpus(read_release(copy), "iemocap", "all"), tmp_path / "out")
    (fault,) = Corpus.open(tmp_path / "out").info["faults"]
    assert fault["file"].endswith(f"{name}.wav")
    assert fault["done"] == "kept as context, without a label"
    split = Corpus.open(tmp_path / "out").split(fault["split"])
    (turn,) = [one for id in range(len(split)) if (one := split.sample(id)).key == fault["key"]]
    assert (turn.label, turn.meta["label"], turn.waveform) == (UNLABELLED, None, None)
    assert turn.text
    assert not verify(tmp_path / "out", workers=1).faults
