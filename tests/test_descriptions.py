"""Descriptions of corpora in YAML: what may be written, and what a message says of what may not."""

import unicodedata
from pathlib import Path

import pytest
from corpus_helpers import run_tool, write_clip

from jointfuse.data.corpora.descriptions import read_description
from jointfuse.data.corpora.files import files_corpus
from jointfuse.errors import UserError

pytestmark = pytest.mark.required
HEAD = "pattern: '(?P<speaker>S[MF]\\d+)_F(?P<text>\\d)_(?P<label>\\w+)\\.wav'\nlabels: {A: anger, H: joy}\n"


def description(folder: Path, *lines: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text("\n".join((HEAD, *lines, "")), encoding="utf-8")
    return path


# --------------------------------------------------------------------------------------------------------------- ranges


@pytest.mark.parametrize(
    ("written", "speakers"),
    [
        ("SM1-SM5", "SM1 SM2 SM3 SM4 SM5"),
        ("SM08-SM11", "SM08 SM09 SM10 SM11"),
        ("SM9-SM11", "SM9 SM10 SM11"),
        ("[SM1-SM2, SF1-SF2, x]", "SM1 SM2 SF1 SF2 x"),
        ("SM1-SM2, SF1", "SM1 SM2 SF1"),
        ("S1M1-S1M2", "S1M1 S1M2"),
        ("P-01-P-02", "P-01 P-02"),
        ("a-b", "a-b"),
        ("SM1-SF2", "SM1-SF2"),
        ("2021-03-05", "2021-03-05"),
    ],
)
def test_a_range_may_have_a_prefix_and_keeps_its_width(tmp_path: Path, written: str, speakers: str) -> None:
    described = read_description(description(tmp_path, f"splits:\n  train: {written}"))
    assert described.splits["train"] == speakers.split()


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("SM5-SM1", "the range 'SM5-SM1' runs backwards; write SM1-SM5"),
        ("[SM1, 03-01]", "the range '03-01' runs backwards; write 01-03"),
        ("1-999999999999", "the range '1-999999999999' has more than 100000 names"),
    ],
)
def test_a_range_that_is_none_is_refused(tmp_path: Path, written: str, says: str) -> None:
    with pytest.raises(UserError, match=f"mine.yaml: splits.train: {says}"):
        read_description(description(tmp_path, f"splits: {{train: {written}}}"))


# ---------------------------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["texts: {1: He said: go, 2: The bus}"], 'line 4: not valid YAML (expected .* quote it: 1: "He said: go"'),
        (["texts: {1: The bus,", "  2: He said: go}"], 'line 5: not valid YAML .* quote it: 2: "He said: go"'),
        (["texts:", "  1: He said: go,"], 'line 5: not valid YAML .* quote it: 1: "He said: go,"'),
        (["texts: {1: what:, 2: The bus}"], 'quote it: 1: "what:"'),
        (["texts: {1: 'Tis late, 2: The bus}"], """quote it: 1: "'Tis late\""""),
        (["texts: {1: [sigh] no}"], 'quote it: 1: "[sigh] no"'),
        (["texts:", '  1: "So" he said', "  2: The bus"], """quote it: 1: '"So" he said'"""),
        (["texts: {1: Well, yes, no, 2: The bus}"], """texts: 'yes' has no text; .* quote it: 1: "Well, yes, no\""""),
        (
            ["texts:", "  1: Take the #1 bus"],
            """texts: 'Take the' ends before a #, .* quote it: 1: "Take the #1 bus\"""",
        ),
    ],
)
def test_a_text_that_yaml_cuts_or_breaks_at_is_shown_as_it_must_be_written(
    tmp_path: Path, lines: list[str], says: str
) -> None:
    path = description(tmp_path, *lines)
    with pytest.raises(UserError) as refusal:
        read_description(path)
    message = str(refusal.value)
    assert message.startswith(str(path))
    position = 0
    for part in says.split(" .* "):
        assert part in message[position:]
        position = message.index(part, position)
    mended = message.rpartition("quote it: ")[2]
    code = mended.partition(":")[0]
    assert read_description(description(tmp_path, "texts:", f"  {mended}")).texts[code]


def test_a_text_may_be_blank_where_that_is_written_and_a_line_may_have_a_comment(tmp_path: Path) -> None:
    described = read_description(description(tmp_path, "texts:", '  1: ""', "  2: The bus  # a comment"))
    assert described.texts == {"1": "", "2": "The bus"}


# ---------------------------------------------------------------------------------------------------------------- names


def test_classes_that_differ_by_case_alone_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("pattern: '(?P<label>\\w+)\\.wav'\nlabels: {a: joy, b: Joy}\n")
    with pytest.raises(UserError, match=r"labels 'Joy' and 'joy' differ by case alone"):
        read_description(path)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_of_files_are_composed_before_they_are_looked_up(tmp_path: Path, form: str) -> None:
    for name in ("zoë_jöy", "zoe\u0308_jo\u0308y2"):
        write_clip(tmp_path / "clips" / f"{name}.wav", pitch=300 + len(name))
    path = tmp_path / "mine.yaml"
    text = "pattern: '(?P<speaker>\\w+)_(?P<label>\\w+)\\.wav'\nlabels: {jöy: joy, jöy2: fun}\nsplits: {train: zoë}\n"
    path.write_text(unicodedata.normalize(form, text), encoding="utf-8")
    spec = files_corpus(tmp_path / "clips", read_description(path), "x")
    assert sorted((row.speaker, spec.labels[row.label]) for (row,) in spec.splits["train"]) == [
        ("zoë", "fun"),
        ("zoë", "joy"),
    ]


# --------------------------------------------------------------------------------------------------------------- report


def test_a_build_says_where_every_file_went_what_no_file_is_of_and_which_class_a_split_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(("SM1_F1_A", "SM1_F1_H", "SM2_F1_A", "SM3_F1_H", "SM1_F1_X", "note")):
        write_clip(tmp_path / "clips" / f"{name}.wav", pitch=200 + 50 * number)
    path = description(
        tmp_path, "keep: {label: [A, H]}", "texts: {1: A line, 2: Another}", "splits: {train: SM1, dev: [SM2-SM4]}"
    )
    out = tmp_path / "out"
    arguments = ("files", path, tmp_path / "clips", "--out", out, "--workers", 1)
    status, said, err = run_tool("build_shards", *arguments, capsys=capsys)
    assert status == 0, err
    lines = said.splitlines()
    assert "texts: no file is of 2" in lines
    assert "splits: no file is of SM4" in lines
    assert "train: 2 rows read: 2 utterances" in lines
    assert "dev: 2 rows read: 2 utterances" in lines
    told = "named otherwise than the pattern says"
    assert f"in no split: 2 rows read: 0 utterances, 1 {told}, 1 label X is not kept" in lines
    assert "observed: split that lacks a class" not in said
    (tmp_path / "clips" / "SM3_F1_H.wav").unlink()
    status, said, _ = run_tool("build_shards", *arguments[:4], tmp_path / "less", *arguments[5:], capsys=capsys)
    assert "observed: split that lacks a class: dev: no utterance of joy" in said
    status, said, _ = run_tool("verify_shards", tmp_path / "less", "--workers", 1, capsys=capsys)
    assert status == 0
    assert "observed: split that lacks a class: 1" in said
    assert "less/dev: no utterance of joy" in said
