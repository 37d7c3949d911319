"""A corpus without a dev split trains where nothing is chosen on it."""

import json
from pathlib import Path
from typing import Any

import pytest
from corpus_helpers import build_here
from distributed import run_ranks
from training_fixtures import LABELS, Trained, corpus, recipe, train

from jointfuse.config import load_config
from jointfuse.data.corpora.table import table_corpus
from jointfuse.errors import UserError
from jointfuse.evaluate.run import evaluate_run
from jointfuse.launch import check_train

__all__ = ["corpus", "recipe"]

pytestmark = pytest.mark.required
LAST = "train.choose_by=last"


@pytest.fixture(scope="module")
def without_dev(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("without dev")
    tables = [(split, corpus.parent / f"{split}.csv") for split in ("train", "test")]
    build_here(table_corpus(tables, "tones", labels=LABELS), folder / "corpus", samples_per_shard=20)
    return folder / "corpus"


def trainings(recipe: Path, corpus: Path, folder: Path) -> tuple[Trained, Trained, str, dict[str, Any]]:
    settings = (f"data.corpus={corpus}", "train.steps=6", "train.evaluate_every=2 steps", "train.save_every=2 steps")
    with pytest.raises(UserError) as refused:
        train(recipe, folder / "refused", *settings)
    assert not (folder / "refused").exists()
    whole = train(recipe, folder / "whole", *settings, LAST)
    train(recipe, folder / "stopped", *settings, LAST, stop_after=4)
    assert not (folder / "stopped" / "best").exists()
    resumed = train(recipe, folder / "stopped", *settings, LAST, resume=True)
    return whole, resumed, str(refused.value), evaluate_run(folder / "stopped", "test").scores


def test_the_model_at_the_end_is_chosen_and_scored(recipe: Path, without_dev: Path, tmp_path: Path) -> None:
    answer = run_ranks(2, trainings, tmp_path / "ranks", recipe, without_dev, tmp_path)[0]
    whole, resumed, refused, scores = answer
    for run, trained in (("whole", whole), ("stopped", resumed)):
        assert trained.position["best_step"] == 6
        assert trained.dev == []
        info = json.loads((tmp_path / run / "best" / "model.json").read_text(encoding="utf-8"))["info"]
        assert (info["step"], info["dev"]) == (6, {})
    assert scores["samples"] == 13
    assert (
        "no split 'dev' to choose the model on by weighted_f1; there are train, test; train.choose_by=last" in refused
    )
    said = (tmp_path / "ranks" / "rank0.log").read_text(encoding="utf-8")
    assert f"finished at step 6; chosen: step 6, no dev split: {tmp_path / 'whole' / 'best'}" in said


def test_it_is_known_before_any_rank_starts(recipe: Path, without_dev: Path, tmp_path: Path) -> None:
    overrides = [f"data.corpus={without_dev}"]
    with pytest.raises(UserError, match="no split 'dev' to choose the model on by macro_f1"):
        check_train(load_config(str(recipe), [*overrides, "train.choose_by=macro_f1"]), tmp_path / "run", False, 1)
    check_train(load_config(str(recipe), [*overrides, LAST]), tmp_path / "run", False, 1)
