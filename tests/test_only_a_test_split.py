"""Corpora without a training split: built to score models on, with the mel statistics of the model."""

import json
from pathlib import Path
from typing import Any

import pytest
from corpus_helpers import build_here, run_tool, small_corpus, write_table
from distributed import run_ranks
from test_report import Page
from training_fixtures import corpus, recipe, train

from jointfuse.capacity.corpus import corpus_of
from jointfuse.config import DataSettings, load_config
from jointfuse.data.corpora.table import table_corpus
from jointfuse.data.mixture import open_data, open_for_training
from jointfuse.data.shards import Corpus
from jointfuse.data.verify import verify
from jointfuse.errors import UserError
from jointfuse.evaluate.corpus_page import write_corpus_page
from jointfuse.launch import check_train

__all__ = ["corpus", "recipe"]

pytestmark = pytest.mark.required
REFUSED = "no split 'train', only test; train on another corpus and score the model on this one"


@pytest.fixture(scope="module")
def of_test(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test table of the corpus that the recipe trains on, alone."""
    out = tmp_path_factory.mktemp("of_test") / "corpus"
    build_here(table_corpus([("test", corpus.parent / "test.csv")], "tones of another"), out)
    return out


def test_a_test_table_alone_is_a_corpus_that_says_it_trains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("table", "--test", small_corpus() / "test.csv", "--out", tmp_path / "out", "--workers", 1)
    status, out, err = run_tool("build_shards", *command, capsys=capsys)
    assert status == 0, err
    assert "no training split (`train`): models can be scored on this corpus, none trained" in out
    info = json.loads((tmp_path / "out" / "corpus.json").read_text())
    assert info["mel"] is None
    assert info["labels"] == ["anger", "joy"], "those of its rows, sorted"
    assert not verify(tmp_path / "out", workers=1).faults


def test_one_class_is_enough_to_score_on_and_two_are_needed_to_train(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": f"line {number}", "label": "joy"} for number in range(3)]
    table = write_table(tmp_path / "joy.csv", rows)
    build_here(table_corpus([("test", table)], "joy", allow_missing=True), tmp_path / "out")
    assert Corpus.open(tmp_path / "out").labels == ["joy"]
    with pytest.raises(UserError, match="only one class, 'joy'; a classifier needs two or more"):
        build_here(table_corpus([("train", table)], "joy", allow_missing=True), tmp_path / "trained")


def in_rank(recipe: Path, run: Path, of_test: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    from jointfuse.evaluate.run import evaluate_run

    train(recipe, run, "train.steps=4")
    return evaluate_run(run, "test").scores, evaluate_run(run, "test", str(of_test)).scores


def test_a_model_scores_on_it_as_on_the_test_split_of_its_own_corpus(
    recipe: Path, of_test: Path, tmp_path: Path
) -> None:
    ((own, other),) = run_ranks(1, in_rank, tmp_path / "ranks", recipe, tmp_path / "run", of_test)
    assert own["samples"] == 13
    assert own == other


def test_training_planning_and_mixing_it_are_refused_or_go_by_the_others(
    of_test: Path, corpus: Path, recipe: Path, tmp_path: Path
) -> None:
    config = load_config(str(recipe), [f"data.corpus={of_test}"])
    for refuse in (
        lambda: open_for_training(config.data),
        lambda: check_train(config, tmp_path / "run", False, 1),
        lambda: corpus_of(config, [5, 5]),
    ):
        with pytest.raises(UserError, match=REFUSED):
            refuse()
    mixed = open_data(DataSettings.model_validate({"mix": [{"corpus": str(one)} for one in (of_test, corpus)]}))
    whole = Corpus.open(corpus)
    assert (mixed.mel_mean, mixed.mel_deviation) == (whole.mel_mean, whole.mel_deviation)
    alone = open_data(DataSettings.model_validate({"mix": [{"corpus": str(of_test)}]}))
    for one in (alone, Corpus.open(of_test)):
        with pytest.raises(UserError, match="without a training split there are no mel statistics"):
            _ = one.mel_mean


def test_statistics_and_the_page_tell_about_it(
    of_test: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run_tool("shard_stats", of_test, "--png", tmp_path / "a.png", capsys=capsys)
    assert status == 0, err
    assert "in train too" not in out
    page = Page(write_corpus_page(Corpus.open(of_test), tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "log-mel" not in page.text
    assert "13" in page.text


def test_mel_statistics_that_a_training_split_lacks_are_a_fault(tmp_path: Path) -> None:
    build_here(table_corpus([("train", small_corpus() / "train.csv")], "small"), tmp_path / "out")
    info = json.loads((tmp_path / "out" / "corpus.json").read_text())
    (tmp_path / "out" / "corpus.json").write_text(json.dumps(info | {"mel": None}))
    (fault,) = verify(tmp_path / "out", workers=1).faults
    assert "mel mean and deviation do not follow from the sidecars" in fault
