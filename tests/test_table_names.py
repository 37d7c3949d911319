"""Names of a table: columns, classes, speakers, dialogues and splits."""

import unicodedata
from collections.abc import Sequence
from pathlib import Path

import pytest
from corpus_helpers import Row, run_tool, write_table
from hypothesis import given
from hypothesis import strategies as st
from test_build_table import refused

from jointfuse.data.corpora.names import known_split, plain_name, plain_text, split_name
from jointfuse.data.corpora.table import table_corpus
from jointfuse.data.rows import CorpusSpec
from jointfuse.errors import UserError

pytestmark = pytest.mark.required


def spec_of(folder: Path, rows: Sequence[Row], split: str | None = "train", **options: object) -> CorpusSpec:
    """The corpus of a table without sound."""
    table = write_table(folder / "t.csv", rows)
    return table_corpus([(split, table)], "t", allow_missing=True, **options)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------- look-alikes


ALIKE = [
    "zoë",
    "zoe\u0308",
    "zo\u200bë",
    "\ufeffzoë",
    "zoë\u00a0",
    "zo\u00adë",
    "\u202ezoë\u202c",
    "zoë\ufe0f",
    "\tzoë \u200b",
]


def test_names_that_look_alike_are_one_class_one_speaker_and_one_dialogue(tmp_path: Path) -> None:
    rows = [
        {"text": str(n), "label": name, "speaker": name, "dialogue": name, "turn": n} for n, name in enumerate(ALIKE)
    ]
    spec = spec_of(tmp_path, [*rows, {"text": "x", "label": "joy", "speaker": "b", "dialogue": "b", "turn": 0}])
    assert spec.labels == ["joy", "zoë"]
    assert [len(dialogue) for dialogue in spec.splits["train"]] == [len(ALIKE), 1]
    assert {row.speaker for row in spec.splits["train"][0]} == {"zoë"}


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_plain_name_is_composed_visible_and_stays_what_it_is(name: str) -> None:
    plain = plain_name(name)
    assert plain_name(plain) == plain == unicodedata.normalize("NFC", plain) == " ".join(plain.split())
    assert not [char for char in plain if unicodedata.category(char) in ("Cc", "Cf")]
    assert plain_name(unicodedata.normalize("NFD", name)) == plain


def test_a_text_is_composed_and_keeps_its_characters() -> None:
    assert plain_text(" zoe\u0308 \u00a0said\u200b: 👨\u200d👩 ") == "zoë \u00a0said\u200b: 👨\u200d👩"
    assert plain_text("\u200b \ufeff") == ""


@pytest.mark.parametrize("labels", [None, ["joy", "Joy"], ["anger"]])
def test_classes_that_differ_by_case_alone_are_refused_by_name(tmp_path: Path, labels: list[str] | None) -> None:
    rows = [{"text": "a", "label": label} for label in ("anger", "Joy", "joy", "joy")]
    with pytest.raises(UserError, match=r"labels '[Jj]oy' and '[Jj]oy'.*differ by case alone; write them alike"):
        spec_of(tmp_path, rows, labels=labels)


def test_a_label_in_another_case_than_the_listed_one_is_named_with_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="row 2: unknown label 'JOY'; did you mean 'joy'"):
        spec_of(tmp_path, [{"text": "a", "label": "JOY"}], labels=["anger", "joy"])


# --------------------------------------------------------------------------------------------------------------- splits


def test_a_split_by_any_of_its_names_in_any_case_is_one_split(tmp_path: Path) -> None:
    names = ["Train", "train", "TRAIN", "training", "Development", "Dev", "Val", "validation ", "devel", "Eval", "Test"]
    names += ["Test1", "test 2", "TEST_2", "Hold Out", "holdout", "HOLDOUT"]
    spec = spec_of(tmp_path, [{"text": "a", "label": "xy"[n % 2], "split": s} for n, s in enumerate(names)], None)
    counts = {split: len(dialogues) for split, dialogues in spec.splits.items()}
    assert counts == {"train": 4, "dev": 5, "test": 2, "test1": 1, "test2": 2, "holdout": 3}


@pytest.mark.parametrize(
    ("cell", "meant"),
    [("trian", "train"), ("Train1", "train"), ("tests", "test"), ("validaton", "validation"), ("trainval", "train")],
)
def test_a_misspelt_split_is_refused_with_the_known_one(cell: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"t row 2: no split '{cell}'; did you mean '{meant}'?"):
        split_name(cell, "t row 2")


def test_a_split_that_is_blank_or_no_folder_is_refused() -> None:
    with pytest.raises(UserError, match="the split cell is blank"):
        split_name("", "t row 2")
    with pytest.raises(UserError, match="is no name for a split"):
        split_name("../../etc", "t row 2")
    assert known_split("Test03") == "test3"
    assert known_split("session") is None


def test_a_row_of_another_split_than_its_table_s_option_is_refused(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "x", "split": "Train"}, {"text": "b", "label": "y", "split": "Test"}]
    with pytest.raises(UserError, match="row 3: its split is 'Test', the table was given as --train"):
        spec_of(tmp_path, rows)
    assert list(spec_of(tmp_path, rows, None, labels=["x", "y"]).splits) == ["train", "test"]
    assert list(spec_of(tmp_path, [row | {"split": "fold 3"} for row in rows]).splits) == ["train"]


# -------------------------------------------------------------------------------------------------------------- columns


@pytest.mark.parametrize(
    ("columns", "part"),
    [
        (("utterance", "transcript"), "text"),
        (("Text", "text"), "text"),
        (("emotion", "label"), "label"),
        (("file", "Path"), "audio"),
        (("speaker", "Speaker ID"), "speaker"),
        (("dialogue", "dialogue_id"), "dialogue"),
        (("turn", "utterance_id"), "turn"),
        (("split", "partition"), "split"),
        (("start", "StartTime"), "start"),
        (("end", "end-time"), "end"),
    ],
)
def test_two_columns_that_could_play_one_part_are_refused_with_the_option_that_decides(
    tmp_path: Path, columns: tuple[str, str], part: str
) -> None:
    cells = {"text": "a", "label": "x", "split": "train", "turn": "0"}
    row = {name: value for name, value in cells.items() if name != part} | dict.fromkeys(columns, "1")
    if part == "split":
        row |= dict.fromkeys(columns, "train")
    if part == "audio":
        (tmp_path / "1").write_bytes(b"sound")
    message = f"'{columns[0]}' and '{columns[1]}' could each be the {part}; say which by --{part}-column"
    with pytest.raises(UserError, match=message):
        spec_of(tmp_path, [row, row | {"label": "y"}], None)
    chosen = spec_of(tmp_path, [row, row | {"turn": "1"}], None, columns={part: columns[1]}, labels=["1", "x"])
    assert f"{part}: column {columns[1]!r}" in chosen.notes


def test_a_column_that_an_option_names_plays_no_other_part(tmp_path: Path) -> None:
    row = {"text": "a", "utterance": "3", "label": "x"}
    (dialogue,) = spec_of(tmp_path, [row], columns={"turn": "utterance"}, labels=["x", "y"]).splits["train"]
    assert (dialogue[0].text, dialogue[0].turn) == ("a", 3)


def test_the_build_says_which_column_played_which_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"Utterance": "a", "Utterance_ID": 0, "Dialogue_ID": 3, "Emotion": "x", "Season": 2}
    train = write_table(tmp_path / "train.csv", [row, row | {"Dialogue_ID": 4, "Emotion": "y"}])
    dev = write_table(tmp_path / "dev.csv", [{"text": "b", "label": "x"}])
    options = ("--allow-missing", "--workers", 1)
    status, said, err = run_tool(
        "build_shards", "table", "--train", train, "--out", tmp_path / "one", *options, capsys=capsys
    )
    assert status == 0, err
    assert said.splitlines()[:5] == [
        "text: column 'Utterance'",
        "label: column 'Emotion'",
        "dialogue: column 'Dialogue_ID'",
        "turn: column 'Utterance_ID'",
        "not used: 'Season'",
    ]
    spec = table_corpus([("train", train), ("dev", dev)], "t", allow_missing=True)
    assert f"{train}: text: column 'Utterance'" in spec.notes
    assert f"{dev}: text: column 'text'" in spec.notes


def test_ids_never_become_texts_in_silence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"utterance": f"id{n}", "transcript": "hello", "label": "xy"[n]} for n in range(2)]
    table = write_table(tmp_path / "t.csv", rows)
    message = refused(tmp_path / "out", "--train", table, "--allow-missing", capsys=capsys)
    assert "t.csv: 'utterance' and 'transcript' could each be the text; say which by --text-column" in message
