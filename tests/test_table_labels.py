"""Labels of a table: which are classes, and what a vote makes of a row a rater."""

import json
from collections import Counter
from pathlib import Path

import pytest
from corpus_helpers import Row, run_tool, write_clip, write_table
from hypothesis import given
from hypothesis import strategies as st
from test_build_table import refused
from test_table_names import spec_of

from jointfuse.data.corpora.labels import classes_of, lost_votes, votes_of
from jointfuse.data.corpora.parts import NO_VALUE, Line
from jointfuse.data.corpora.table import table_corpus
from jointfuse.data.shards import Corpus
from jointfuse.errors import UserError

pytestmark = pytest.mark.required


def labelled(*labels: str) -> list[Row]:
    return [{"text": f"line {n}", "label": label} for n, label in enumerate(labels)]


def line(label: str, clip: str = "", split: str = "train", **cells: str) -> Line:
    return Line({"label": label, "audio": clip, **cells}, split, Path(), "t.csv row 2")


# -------------------------------------------------------------------------------------------------------------- classes


@pytest.mark.parametrize("label", NO_VALUE)
def test_a_label_that_says_there_is_none_is_asked_about_unless_it_is_listed(tmp_path: Path, label: str) -> None:
    with pytest.raises(UserError, match=f"row 3: the label is '{label}', no value; .* list it among --labels"):
        spec_of(tmp_path, labelled("joy", label))
    assert spec_of(tmp_path, labelled("joy", label), labels=["joy", label]).labels == ["joy", label]
    for part in ("speaker", "dialogue"):
        with pytest.raises(UserError, match=f"row 2: the {part} cell is '{label}', no value"):
            spec_of(tmp_path, [{"text": "a", "label": "joy", part: label}])


def test_a_blank_label_is_named_with_its_row(tmp_path: Path) -> None:
    for labels in (None, ["joy", "sad"]):
        with pytest.raises(UserError, match="row 3: the label cell is blank; fill it, or give --unlabelled context"):
            spec_of(tmp_path, labelled("joy", "\u200b"), labels=labels)


@pytest.mark.parametrize("label", ["3.5", "4.0", "-0,25", ".5", "1.5e3"])
def test_scores_are_no_classes_unless_they_are_listed(tmp_path: Path, label: str) -> None:
    with pytest.raises(UserError, match=f"row 3: the label '{label}' is a number with a fraction"):
        spec_of(tmp_path, labelled("3", label))
    assert spec_of(tmp_path, labelled("3", label), labels=["3", label]).labels == ["3", label]


def test_a_score_of_json_lines_is_no_class(tmp_path: Path) -> None:
    table = tmp_path / "t.jsonl"
    table.write_text(json.dumps({"text": "a", "label": 3.5}))
    with pytest.raises(UserError, match=r"row 1: the label '3\.5' is a number"):
        table_corpus([("train", table)], "t", allow_missing=True)


@pytest.mark.parametrize(("classes", "rows"), [(11, 30), (21, 200), (300, 1000)])
def test_more_labels_than_classes_can_be_are_asked_about_unless_they_are_listed(
    tmp_path: Path, classes: int, rows: int
) -> None:
    labels = [f"c{n % classes}" for n in range(rows)]
    with pytest.raises(UserError, match=f"t.csv: {classes} labels in {rows} labelled rows .* too many for classes"):
        spec_of(tmp_path, labelled(*labels))
    listed = sorted(set(labels))
    assert spec_of(tmp_path, labelled(*labels), labels=listed).labels == listed


@pytest.mark.parametrize(("classes", "rows"), [(29, 29 - 9), (8, 30), (20, 60), (28, 280)])
def test_a_small_table_and_one_of_many_classes_are_not_asked_about(classes: int, rows: int) -> None:
    lines = [line(f"c{n % classes}") for n in range(rows)]
    assert len(classes_of(lines)) == min(classes, rows)


def test_whole_numbers_are_classes_in_the_order_of_their_size() -> None:
    assert classes_of([line(str(n)) for n in (10, 9, -1, 0)]) == ["-1", "0", "9", "10"]


# ---------------------------------------------------------------------------------------------------------------- votes


def test_a_clip_under_two_labels_is_refused_with_both_rows_and_the_way_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.wav").write_bytes(b"sound")
    rows = [{"text": "a", "label": label, "audio": clip} for label, clip in (("joy", "a.wav"), ("sad", "./a.wav"))]
    table = write_table(tmp_path / "t.csv", rows)
    for labels in ((), ("--labels", "joy,sad")):
        message = refused(tmp_path / "out", "--train", table, *labels, capsys=capsys)
        assert "t.csv row 3: ./a.wav is 'sad' and, in t.csv row 2, 'joy'; give --votes majority" in message
    with pytest.raises(UserError, match=r"row 3: turn 1 of d is 'sad' and, in t\.csv row 2, 'joy'"):
        spec_of(tmp_path, [{"text": "a", "label": label, "dialogue": "d", "turn": 1} for label in ("joy", "sad")])
    assert "there is only `majority`" in refused(tmp_path / "out", "--train", table, "--votes", "all", capsys=capsys)


def test_one_recording_under_several_labels_at_several_times_is_several_clips(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.wav", 2.0)
    rows = [
        {"text": "a", "label": label, "audio": "a.wav", "start": start, "end": start + 0.5}
        for start, label in enumerate(("joy", "sad"))
    ]
    assert len(spec_of(tmp_path, rows).splits["train"]) == 2


def test_a_row_a_rater_becomes_an_utterance_with_the_label_of_most(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    votes = {
        ("train", 0): "joy joy sad",
        ("train", 1): "sad",
        ("train", 2): "joy sad",  # tied
        ("train", 3): "sad sad joy fear",
        ("train", 4): "joy joy sad sad fear",  # tied
        ("dev", 0): "joy joy",
        ("test", 0): "joy",
        ("test", 1): "sad joy",  # tied
    }
    rows = []
    for turn in range(5):  # a rater after the other, so that the rows of one clip are not neighbours
        for (split, number), labels in votes.items():
            clip = f"{split}{number}.wav"
            write_clip(tmp_path / clip, pitch=200 + 10 * len(rows)) if turn == 0 else None
            rows += [
                {"split": split, "audio": clip, "text": clip, "label": label, "rater": turn}
                for label in labels.split()[turn : turn + 1]
            ]
    table, out = write_table(tmp_path / "t.csv", rows), tmp_path / "out"
    options = ("--votes", "majority", "--workers", 1)
    status, said, err = run_tool("build_shards", "table", table, "--out", out, *options, capsys=capsys)
    assert status == 0, err
    corpus = Corpus.open(out)
    built = {
        split: [(sample.text, sample.meta["emotion"]) for sample in map(corpus.split(split).sample, range(size))]
        for split, size in (("train", 3), ("dev", 1), ("test", 1))
    }
    assert built == {
        "train": [("train0.wav", "joy"), ("train1.wav", "sad"), ("train3.wav", "sad")],
        "dev": [("dev0.wav", "joy")],
        "test": [("test0.wav", "joy")],
    }
    assert corpus.info["rows"] == {
        "train": {"read": 15, "utterances": 3, "further votes on an utterance": 5, "votes that were tied": 7},
        "dev": {"read": 2, "utterances": 1, "further votes on an utterance": 1},
        "test": {"read": 3, "utterances": 1, "votes that were tied": 2},
    }
    assert "train: 15 rows read: 3 utterances, 5 further votes on an utterance, 7 votes that were tied" in said
    assert [(fault["split"], fault["file"], fault["fault"]) for fault in corpus.info["faults"]] == [
        ("train", "t.csv", "2 utterance(s) whose votes are tied (train2.wav, train4.wav)"),
        ("test", "t.csv", "1 utterance(s) whose votes are tied (test1.wav)"),
    ]


@pytest.mark.parametrize("part", ["text", "speaker", "dialogue", "turn", "split"])
def test_votes_on_one_clip_that_differ_in_more_than_the_label_are_refused(tmp_path: Path, part: str) -> None:
    row = {"text": "1", "label": "joy", "audio": "a.wav", "speaker": "1", "dialogue": "1", "turn": "1", "split": "dev"}
    other = row | {part: "train" if part == "split" else "2"}
    with pytest.raises(UserError, match=f"row 3: rates the clip of t.csv row 2 but has another {part}"):
        spec_of(tmp_path, [row, other], None, votes="majority")


def test_a_split_whose_votes_are_all_tied_is_missed_by_name(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": label, "dialogue": "d", "turn": 0} for label in ("joy", "sad")]
    with pytest.raises(UserError, match="every vote of split 'train' is tied"):
        spec_of(tmp_path, rows, votes="majority")


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xyz"), st.sampled_from(["train", "dev"])), max_size=30)
)
def test_every_vote_is_an_utterance_a_further_vote_or_tied(votes: list[tuple[str, str, str]]) -> None:
    lines = [line(label, f"{split}/{clip}.wav", split) for label, clip, split in votes]
    polls = votes_of(lines)
    elected = Counter(poll.elected.split for poll in polls if poll.elected)
    lost = lost_votes(polls)
    for split, read in Counter(one.split for one in lines).items():
        assert read == elected[split] + sum(lost.get(split, {}).values())
    for poll in polls:
        counts = Counter(one.cells["label"] for one in poll.lines)
        first = [label for label, count in counts.items() if count == max(counts.values())]
        assert (poll.elected.cells["label"] if poll.elected else None) == (first[0] if len(first) == 1 else None)
