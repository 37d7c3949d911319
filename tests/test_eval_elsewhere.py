"""Scores of a model on other data than its own: a folder and an identity of their own, labels by other names, classes
that are not there."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import LABELS, MAX_SECONDS, MODEL, VOCABULARY, build_corpus, model_settings
from typer.testing import CliRunner

from jointfuse.cli import app
from jointfuse.config import validate
from jointfuse.data.mixture import corpus_digest
from jointfuse.data.shards import Corpus
from jointfuse.data.tokenizer import train_tokenizer
from jointfuse.errors import UserError
from jointfuse.evaluate.run import evaluate_run
from jointfuse.model.export import save_model
from jointfuse.model.network import Network

pytestmark = pytest.mark.required
TEST_ALONE = {"train": 6, "dev": 4, "test": 9}
OTHER_LABELS = ("anger", "bored", "hap", "neutral")  # in sorted order, as a builder leaves them
NAMED = "data.labels={hap: joy, bored: null}"


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return build_corpus(tmp_path_factory.mktemp("own") / "corpus", sizes=TEST_ALONE)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Another corpus of the same name."""
    return build_corpus(tmp_path_factory.mktemp("other") / "corpus", labels=OTHER_LABELS, sizes=TEST_ALONE)


@pytest.fixture
def run(own: Corpus, tmp_path: Path) -> Path:
    tree: dict[str, Any] = {
        "data": {"corpus": str(own.path), "max_seconds": MAX_SECONDS, "max_tokens": 40, "workers": 0},
        "model": MODEL,
        "train": {"steps": 1},
    }
    tokenizer = train_tokenizer(own.split("train"), VOCABULARY)
    network = Network(model_settings(), len(LABELS), 40, MAX_SECONDS, tokenizer_size=len(tokenizer))
    mel, info = (own.mel_mean, own.mel_deviation), {"step": 1, "corpus": corpus_digest(own)}
    save_model(
        tmp_path / "run" / "best",
        network.state_dict(),
        network,
        validate(tree, "test"),
        list(LABELS),
        mel,
        tokenizer,
        info,
    )
    return tmp_path / "run"


def evaluated(run: Path, *arguments: object) -> tuple[int, str]:
    answer = CliRunner().invoke(app, ["eval", str(run), *map(str, arguments)])
    if isinstance(answer.exception, UserError):
        return 2, str(answer.exception)
    return answer.exit_code, answer.output


def facts(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return content


def test_another_corpus_has_a_folder_of_its_own_and_each_report_says_what_it_is_of(
    run: Path, own: Corpus, other: Corpus
) -> None:
    _, said = evaluated(run)
    assert said.splitlines()[-1] == f"report: {run / 'eval-test' / 'report.html'}"
    before = {path.name: path.read_bytes() for path in (run / "eval-test").iterdir()}
    _, elsewhere = evaluated(run, "--corpus", other.path, NAMED)
    (folder,) = run.glob("eval-test-*")
    assert folder.name.startswith("eval-test-tones-")
    assert elsewhere.splitlines()[-1] == f"report: {folder / 'report.html'}"
    assert {path.name: path.read_bytes() for path in (run / "eval-test").iterdir()} == before
    model = hashlib.sha256((run / "best" / "model.safetensors").read_bytes()).hexdigest()
    for where, corpus in ((run / "eval-test", own), (folder, other)):
        found = facts(where)
        assert found["corpora"] == [{"name": "tones", "sha256": corpus_digest(corpus)}]
        assert (found["split"], found["model_sha256"]) == ("test", model)
        assert found["samples"] == np.array(found["confusion"]).sum()


def test_data_of_one_name_do_not_share_a_folder(run: Path, own: Corpus, other: Corpus, tmp_path: Path) -> None:
    folders = {
        evaluate_run(run, split, corpus, labels).folder
        for split in ("test", "dev")
        for corpus, labels in (
            (None, []),
            (None, ["data.labels={joy: null}"]),
            (str(other.path), [NAMED]),
            (str(other.path), ["data.labels={hap: joy, bored: fear}"]),
        )
    }
    assert len(folders) == 8
    assert all(folder.parent == run for folder in folders)
    named = shutil.copytree(other.path, tmp_path / "named")
    info = json.loads((named / "corpus.json").read_text(encoding="utf-8"))
    (named / "corpus.json").write_text(json.dumps(info | {"name": "../../a b/\n情感"}), encoding="utf-8")
    folder = evaluate_run(run, "test", str(named), [NAMED]).folder
    assert folder.parent == run
    assert folder.name.startswith("eval-test-a-b-情感-")


def test_the_own_corpus_is_known_wherever_it_lies(run: Path, own: Corpus, tmp_path: Path) -> None:
    moved = shutil.copytree(own.path, tmp_path / "moved")
    assert evaluate_run(run, "test", str(moved)).folder == run / "eval-test"
    assert evaluate_run(run, "test", None, ["data.workers=0"]).folder == run / "eval-test"


def test_labels_by_other_names_are_scored_and_classes_that_are_not_there_are_said(run: Path, other: Corpus) -> None:
    status, said = evaluated(run, "--corpus", other.path, NAMED)
    assert status == 0
    assert "no utterance of the split is fear\n" in said
    assert "macro F1 of the 3 present" in said
    (folder,) = run.glob("eval-test-*")
    found = facts(folder)
    labels = [other.labels[label] for label in other.split("test").index["label"]]
    assert found["samples"] == sum(label != "bored" for label in labels)
    supports = {name: row["support"] for name, row in found["per_class"].items()}
    assert supports == {
        "anger": labels.count("anger"),
        "fear": 0,
        "joy": labels.count("hap"),
        "neutral": labels.count("neutral"),
    }
    assert found["absent"] == ["fear"]
    f1 = [row["f1"] for name, row in found["per_class"].items() if name != "fear"]
    assert found["macro_f1_present"] == pytest.approx(sum(f1) / 3)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Not in this split: fear." in page
    assert f"of the classes that occur: {100 * found['macro_f1_present']:.1f}" in page


def test_a_label_of_either_side_may_be_named_and_one_of_neither_not(run: Path, other: Corpus) -> None:
    both = "data.labels={hap: joy, bored: null, fear: anger}"  # fear: of the model's corpus alone
    assert evaluated(run, "--corpus", other.path, both)[0] == 0
    status, said = evaluated(run, "--corpus", other.path, "data.labels={hap: joy, bored: null, bord: null}")
    assert status == 2
    assert "neither a corpus nor the model has a label 'bord'; there are anger, bored, hap, neutral" in said
    status, said = evaluated(run, "--corpus", other.path)
    assert status == 2
    assert "the model was trained on anger, fear, joy, neutral; data.labels={bored: anger} gives" in said


@pytest.mark.parametrize(
    "override", ["data.max_seconds=1", "data.corpus=x", "train.lr=1", "model.blocks=1", "nonsense"]
)
def test_what_the_model_was_trained_with_cannot_be_overridden(override: str, run: Path) -> None:
    status, said = evaluated(run, override)
    assert status == 2
    assert said.startswith(f"override '{override}': a model is scored as it was trained; ")
    assert "data.labels" in said
    assert not list(run.glob("eval-*"))
