"""The page about a corpus: everything in it, nothing from outside, the same bytes twice, and corpora with gaps."""

import base64
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from corpus_helpers import build_here, make_tables, run_tool, small_corpus, write_table
from helpers import build_corpus
from test_report import ATTACK, Page

from jointfuse.data.corpora.table import table_corpus
from jointfuse.data.shards import Corpus
from jointfuse.evaluate.corpus_page import FAULTS_LISTED, SAMPLES, write_corpus_page


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_corpus() / "built", tmp_path / "corpus"))


def page_of(folder: Path, out: Path) -> Page:
    return Page(write_corpus_page(Corpus.open(folder), out).read_text(encoding="utf-8"))


@pytest.mark.required
def test_the_page_shows_every_class_and_plays_the_clips_that_are_stored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small.html"
    status, printed, err = run_tool("shard_stats", small_corpus() / "built", "--page", out, capsys=capsys)
    assert status == 0, err
    assert f"{out}: written" in printed
    page = Page(out.read_text(encoding="utf-8"))
    counts = ("Utterances", "28", "joy", "7 · 35.0%", "Words, median and most", "4, 4")
    for expected in (*counts, "train · train_train1_002 · Ann · turn 2"):
        assert expected in page.text
    clips = [address for address in page.addresses if address.startswith("data:audio/flac")]
    assert len(clips) == 3 * SAMPLES
    stored = set()
    for name in ("train", "dev", "test"):
        split = Corpus.open(small_corpus() / "built").split(name)
        stored |= {split.audio_bytes(id) for id in range(len(split))}
    for clip in clips:
        data = base64.b64decode(clip.partition(",")[2])
        assert data in stored
        assert soundfile.info(io.BytesIO(data)).samplerate == 16_000
    assert len([address for address in page.addresses if address.startswith("data:image/svg")]) == 1 + 3 * SAMPLES


def test_the_page_needs_nothing_from_outside_and_runs_nothing(tmp_path: Path) -> None:
    rows = make_tables(tmp_path)
    for row in rows["train"]:
        row |= {"text": ATTACK, "speaker": ATTACK}
    table = write_table(tmp_path / "train.csv", rows["train"])
    build_here(table_corpus([("train", table)], ATTACK), tmp_path / "corpus")
    page = page_of(tmp_path / "corpus", tmp_path / "page.html")
    assert ATTACK in page.text
    assert "script" not in page.tags
    assert page.handlers == []
    assert all(re.match("data:(image/svg\\+xml|audio/flac);base64,", address) for address in page.addresses)


def test_the_same_corpus_gives_the_same_page(tmp_path: Path) -> None:
    built = small_corpus() / "built"
    first, second = (page_of(built, tmp_path / name) for name in ("a.html", "b.html"))
    assert first.text == second.text
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "b.html"]


def test_faults_that_the_builder_named_are_counted_and_listed(copy: Path, tmp_path: Path) -> None:
    info = json.loads((copy / "corpus.json").read_text())
    one = {"split": "dev", "key": None, "file": "dia110_utt7.mp4", "fault": "missing <b>", "done": "kept without clip"}
    info["faults"] = [one] * (FAULTS_LISTED + 1)
    (copy / "corpus.json").write_text(json.dumps(info))
    text = page_of(copy, tmp_path / "page.html").text
    assert f"missing <b>kept without clip{FAULTS_LISTED + 1}" in text
    assert f"the first {FAULTS_LISTED} of {FAULTS_LISTED + 1}" in text
    assert text.count("dia110_utt7.mp4") == FAULTS_LISTED
    info["faults"] = []
    (copy / "corpus.json").write_text(json.dumps(info))
    assert "None found." in page_of(copy, tmp_path / "page.html").text


def test_utterances_without_clip_or_text_and_classes_without_utterances_have_their_place(tmp_path: Path) -> None:
    build_corpus(tmp_path / "gapped", gaps=("text", "clip", "everything"), labels=("a", "b", "c", "d"))
    text = page_of(tmp_path / "gapped", tmp_path / "page.html").text
    assert "no audio" in text or "no text" in text
    rows = make_tables(tmp_path / "tables")
    for row in rows["train"]:
        row["audio"] = ""
    table = write_table(tmp_path / "tables" / "train.csv", rows["train"])
    labels = ["anger", "fear", "joy", "nobody"]
    build_here(table_corpus([("train", table)], "text", labels=labels, allow_missing=True), tmp_path / "text")
    page = page_of(tmp_path / "text", tmp_path / "page.html")
    assert "0 · 0.0%" in page.text
    assert page.text.count("no audio") == 3 * SAMPLES
    assert not [address for address in page.addresses if address.startswith("data:audio")]


def test_a_clip_of_few_samples_and_silence_are_drawn(tmp_path: Path) -> None:
    rows = make_tables(tmp_path)["train"][:4]
    for row, clip in zip(rows, (np.zeros(1), np.zeros(3), np.zeros(160), np.ones(50)), strict=True):
        soundfile.write(tmp_path / row["audio"], clip, 16_000)
    build_here(table_corpus([("train", write_table(tmp_path / "train.csv", rows))], "short"), tmp_path / "corpus")
    assert "short" in page_of(tmp_path / "corpus", tmp_path / "page.html").text


def test_a_page_of_another_ending_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run_tool("shard_stats", small_corpus() / "built", "--page", tmp_path / "a.pdf", capsys=capsys)
    assert status == 2
    assert "give a name ending in .html" in err


@pytest.mark.parametrize("option", ["--png", "--page"])
def test_a_folder_that_is_not_there_is_one_line_before_anything_is_counted(
    option: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "nowhere" / f"x.{'png' if option == '--png' else 'html'}"
    status, out, err = run_tool("shard_stats", small_corpus() / "built", option, file, capsys=capsys)
    assert (status, out) == (2, "")
    assert err == f"error: {option} {file}: there is no folder {file.parent}; make it first\n"
