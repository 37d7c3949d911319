"""Tables as they are written: what is read, what is refused, and that nothing is read otherwise than it was meant."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from corpus_helpers import run_tool, write_table
from hypothesis import example, given
from hypothesis import strategies as st
from test_build_table import refused

from jointfuse.data.corpora.cells import csv_rows, read_table
from jointfuse.errors import UserError

pytestmark = pytest.mark.required
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to_file(name: str, *lines: str) -> Path:
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="")
        return path

    return to_file


def texts(path: Path) -> list[str]:
    return [cells["text"] for _, cells in read_table(path)]


# ------------------------------------------------------------------------------------------------------ quotation marks


SPOKEN = ['"So," he said', "Yes.", '"Never', 'he said "no"', 'ever"', '"Fine."', 'a "b" c', "don't", '"']


def test_a_tab_separated_table_keeps_every_row_whose_text_begins_with_a_quotation_mark(write: Write) -> None:
    table = write("t.tsv", "text\temotion\taudio", *(f"{text}\tjoy\t{n}.wav" for n, text in enumerate(SPOKEN)))
    assert texts(table) == [text if text != '"Fine."' else "Fine." for text in SPOKEN]


def test_marks_that_open_in_one_column_and_close_in_another_are_text(write: Write) -> None:
    table = write("t.tsv", "text\ttranslation", '"Well\tNun', 'b\tja"', "c\td")
    assert [list(cells.values()) for _, cells in read_table(table)] == [['"Well', "Nun"], ["b", 'ja"'], ["c", "d"]]


def test_a_tab_separated_table_that_pandas_quoted_is_unquoted(write: Write) -> None:
    rows = ['"""So,"" he said"\tjoy\t1.wav', '"a\tb"\tjoy\t2.wav', '"first', 'second"\tjoy\t3.wav', "c\tjoy\t4.wav"]
    assert texts(write("t.tsv", "text\temotion\taudio", *rows)) == ['"So," he said', "a\tb", "first\nsecond", "c"]


def test_a_tab_separated_table_that_reads_both_ways_is_refused_with_its_row(write: Write) -> None:
    table = write("t.tsv", "text\temotion\taudio", "a\tjoy\t1.wav", '"Well\tjoy\t2.wav', 'yes"\tsad\t3.wav')
    with pytest.raises(UserError, match=r"t.tsv row 3: the quotation mark before 'Well.* takes in 2 lines that look"):
        read_table(table)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (
            ["a,joy,1.wav", '"So," he said,joy,2.wav'],
            'row 3: BEGINS and goes on behind the closing one ("So," he said,',
        ),
        (["a,joy,1.wav", '"So we go,joy,2.wav', "b,joy,3.wav"], 'row 3: BEGINS and never ends ("So we go,joy,2.wav)'),
        (['"a, b",joy,"c" d'], 'row 2: BEGINS and goes on behind the closing one ("c" d)'),
        (['x, "b" ,1.wav'], 'row 2: BEGINS and goes on behind the closing one ("b" ,1.wav)'),
        (['"Well,joy,1.wav', 'yes",sad,2.wav'], "row 2: the quotation mark before 'Well,joy,1.wav\\nyes' takes in 2"),
        (['"Well,joy,1.wav', "no,sad,2.wav", "", 'yes",sad,3.wav'], "takes in 4 lines that look like rows"),
        (['"Well, I,joy,1.wav', 'never, ever said yes",sad,2.wav'], "takes in 2 lines that look like rows"),
        (['"Well,joy,1.wav', '",sad,2.wav'], "takes in 2 lines that look like rows"),
        (['"Well,joy', 'yes",1.wav'], "row 2: 2 cells under 3 column names (a quotation mark before 'Well,joy"),
    ],
)
def test_a_quotation_mark_that_is_no_quote_is_refused_with_its_row(write: Write, lines: list[str], says: str) -> None:
    with pytest.raises(UserError) as refusal:
        read_table(write("t.csv", "text,emotion,audio", *lines))
    assert says.replace("BEGINS", "a cell begins with a quotation mark") in str(refusal.value)
    assert "mend it" in str(refusal.value) or "double those inside it" in str(refusal.value)


def test_a_quoted_cell_may_hold_commas_doubled_marks_and_lines_of_prose(write: Write) -> None:
    table = write(
        "t.csv", "n,text,label", '1,"Dear Ann, dear Bob,', 'well, yes",joy', '2, "a, ""b""",joy', "3,it's,joy"
    )
    assert texts(table) == ["Dear Ann, dear Bob,\nwell, yes", 'a, "b"', "it's"]


def test_a_quotation_mark_ends_a_build_before_anything_is_written(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write("t.csv", "text,emotion,audio", '"So," he said,joy,1.wav', "b,sad,2.wav")
    message = refused(tmp_path / "out", "--train", table, capsys=capsys)
    assert "t.csv row 2: a cell begins with a quotation mark" in message
    assert "save the table as JSON Lines" in message
    assert not (tmp_path / "out").exists()


CELLS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.text('",\t\n ab', max_size=8)


@given(st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1, max_size=6), st.sampled_from([",", ";", "\t"]))
@example([("Well,joy,1.wav\nyes", "sad", "2.wav")], ",")
@example([("Well\tjoy\nyes", "sad", "2.wav")], "\t")
def test_a_table_that_a_csv_writer_wrote_reads_back_as_it_was_or_is_refused(
    rows: list[tuple[str, ...]], delimiter: str
) -> None:
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerow(["text", "label", "audio"] if delimiter != ";" else ["text", "label", "a;b"])
    writer.writerows(rows)
    many_lines = any(char in cell for row in rows for cell in row for char in "\n\r")
    try:
        read = list(csv_rows(Path("t.tsv" if delimiter == "\t" else "t.csv"), file.getvalue()))
    except UserError:
        if many_lines:  # two readings fit
            return
        raise
    assert [[cell.strip() for cell in cells.values()] for _, cells in read] == [
        [cell.strip() for cell in row] for row in rows
    ]


UNQUOTED = st.text(st.sampled_from('ab "'), max_size=6)


@given(st.lists(st.tuples(UNQUOTED, UNQUOTED), min_size=1, max_size=6), st.sampled_from([",", "\t"]))
@example([('"a', "x"), ('b"', "y")], "\t")
@example([('"a', "x"), ('b"', "y")], ",")
def test_a_table_written_without_quoting_loses_no_row_or_is_refused(
    rows: list[tuple[str, str]], delimiter: str
) -> None:
    lines = [delimiter.join(("text", "label", "audio")), *(delimiter.join((*row, "1.wav")) for row in rows)]
    try:
        read = list(csv_rows(Path("t.tsv" if delimiter == "\t" else "t.csv"), "\n".join(lines)))
    except UserError:
        return
    assert len(read) == len(rows)


# ----------------------------------------------------------------------------------------------------------- JSON Lines


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (["joy", "anger"], "row 2: column 'emotion' holds a list"),
        ({"joy": 1}, "row 2: column 'emotion' holds an object"),
        (True, "row 2: column 'emotion' holds true or false"),
        (float("inf"), "row 2: column 'emotion' holds no finite number"),
    ],
)
def test_a_json_cell_is_a_string_a_number_or_null(write: Write, value: object, says: str) -> None:
    rows = [{"text": "a", "emotion": label} for label in ("joy", value)]
    with pytest.raises(UserError, match=says):
        read_table(write("t.jsonl", *map(json.dumps, rows)))


@pytest.mark.parametrize("line", ['{"text": "a", "text": "b"}', "[" * 100_000, "[1]", '{"text": 1' + "0" * 5000 + "}"])
def test_a_line_that_is_no_plain_json_object_is_refused_with_its_row(write: Write, line: str) -> None:
    with pytest.raises(UserError, match=r"t\.jsonl row 2: not "):
        read_table(write("t.jsonl", '{"text": "a"}', line))


def test_nan_as_pandas_writes_it_is_a_blank_cell(write: Write) -> None:
    rows = ['{"text": NaN, "label": "joy", "speaker": null, "turn": 3}', '{"text": "nan", "label": 2}']
    (_, first), (_, second) = read_table(write("t.jsonl", *rows))
    assert first == {"text": "", "label": "joy", "speaker": "", "turn": "3"}
    assert second == {"text": "nan", "label": "2"}


# ------------------------------------------------------------------------------------------------------ rows and report


def test_the_report_of_a_build_says_where_every_row_went(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": f"line {n}", "label": "xy"[n % 2], "split": ("Train", "val")[n % 3 == 0]} for n in range(9)]
    table, out = write_table(tmp_path / "all.csv", rows), tmp_path / "out"
    options = ("--allow-missing", "--workers", 1)
    status, said, err = run_tool("build_shards", "table", table, "--out", out, *options, capsys=capsys)
    assert status == 0, err
    assert "train: 6 rows read: 6 utterances" in said
    assert "dev: 3 rows read: 3 utterances" in said
    info = json.loads((out / "corpus.json").read_text())
    assert info["rows"] == {"dev": {"read": 3, "utterances": 3}, "train": {"read": 6, "utterances": 6}}
