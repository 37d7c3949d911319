import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import run_ranks
from helpers import read
from training_fixtures import LABELS, SIZES, corpus, recipe

from jointfuse.config import load_config
from jointfuse.data.plan import evaluation_batches
from jointfuse.data.reader import UtteranceReader
from jointfuse.data.shards import Corpus
from jointfuse.data.tokenizer import train_tokenizer
from jointfuse.errors import UserError
from jointfuse.evaluate import predict as predicting
from jointfuse.evaluate import run as running
from jointfuse.evaluate.metrics import Predictions
from jointfuse.model.export import save_model
from jointfuse.model.network import Network

__all__ = ["corpus", "recipe"]

pytestmark = pytest.mark.required
BATCH = 4  # 13 utterances make 4 batches, the last of one utterance: uneven for 2 ranks and for 3


@pytest.fixture(scope="module")
def run(recipe: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RUN/best as training leaves it, of a model that has learnt a little without DeepSpeed."""
    config = load_config(str(recipe), ["data.workers=0"])
    data = Corpus.open(corpus)
    tokenizer = train_tokenizer(data.split("train"), 300)
    torch.manual_seed(0)
    network = Network(config.model, len(LABELS), config.data.max_tokens, config.data.max_seconds, len(tokenizer))
    mel = (data.mel_mean, data.mel_deviation)
    reader = UtteranceReader(data.split("train"), config.data, tokenizer, True, *mel)
    batch = read(reader, range(24))
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(12):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(batch)[0], batch.labels).backward()
        optimizer.step()
    run = tmp_path_factory.mktemp("evaluated") / "run"
    save_model(
        run / "best",
        network.state_dict(),
        network,
        config,
        list(LABELS),
        mel,
        tokenizer,
        {"step": 1, "epoch": 0, "dev": {}},
    )
    return run


def evaluate(run: Path) -> tuple[dict[str, Any], Predictions]:
    """The scores and the predictions behind them, with batches of BATCH."""
    seen: list[Predictions] = []
    real_batch, real = predicting.EVALUATION_BATCH, running.predict

    def predict_and_keep(*arguments: Any) -> Predictions:
        seen.append(real(*arguments))
        return seen[-1]

    predicting.EVALUATION_BATCH = BATCH
    running.predict = predict_and_keep
    try:
        return running.evaluate_run(run, "test").scores, seen[0]
    finally:
        predicting.EVALUATION_BATCH = real_batch
        running.predict = real


@pytest.fixture(scope="module")
def alone(run: Path) -> tuple[dict[str, Any], Predictions]:
    return evaluate(run)


def test_ranks_hold_unequal_loads(corpus: Path) -> None:
    durations = np.asarray(Corpus.open(corpus).split("test").index["duration_ms"])
    assert len(durations) == SIZES["test"]
    for ranks in (2, 3):
        real = [sum(valid.sum() for _, valid in evaluation_batches(durations, BATCH, ranks, r)) for r in range(ranks)]
        rounds = {len(list(evaluation_batches(durations, BATCH, ranks, r))) for r in range(ranks)}
        assert sum(real) == len(durations)
        assert len(set(real)) > 1
        assert len(rounds) == 1, "all ranks take as many turns"


def test_the_model_answers_more_than_one_class(alone: tuple[dict[str, Any], Predictions]) -> None:
    result, predictions = alone
    assert len(set(predictions.predicted.tolist())) > 1
    assert np.array_equal(np.array(result["confusion"]).sum(axis=1), np.bincount(predictions.labels, minlength=4))


@pytest.mark.parametrize("ranks", [2, 3])
def test_scores_are_the_same_on_any_number_of_ranks(
    ranks: int, run: Path, alone: tuple[dict[str, Any], Predictions], tmp_path: Path
) -> None:
    copied = tmp_path / "run"
    shutil.copytree(run / "best", copied / "best")
    answers = run_ranks(ranks, evaluate, tmp_path / "ranks", copied)
    result, predictions = alone
    for scored, predicted in answers:
        assert scored == result
        assert np.array_equal(predicted.labels, predictions.labels)
        assert np.allclose(predicted.logits, predictions.logits, atol=1e-5)
        assert np.allclose(predicted.features, predictions.features, atol=1e-4)
    written = (copied / "eval-test" / "metrics.json").read_bytes()
    assert written == (run / "eval-test" / "metrics.json").read_bytes()
    assert json.loads(written)["weighted_f1"] == result["weighted_f1"]
    assert (copied / "eval-test" / "report.html").exists()


def test_evaluation_unpickles_nothing(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copied = tmp_path / "run"
    shutil.copytree(run / "best", copied / "best")
    for name in ("best/pytorch_model.bin", "best/model.pt", "checkpoints/latest"):
        (copied / name).parent.mkdir(exist_ok=True)
        (copied / name).write_bytes(b"not to be read")

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("something was unpickled")

    monkeypatch.setattr(torch, "load", refuse)
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    with pytest.raises(AssertionError, match="unpickled"):
        pickle.loads(b"")
    running.evaluate_run(copied, "test")
    assert (copied / "eval-test" / "metrics.json").exists()


def test_a_split_or_a_corpus_that_does_not_fit_the_model_is_refused(run: Path, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no split 'holdout'; there are train, dev, test"):
        running.evaluate_run(run, "holdout")
    other = Path(shutil.copytree(corpus, tmp_path / "other"))
    info = json.loads((other / "corpus.json").read_text(encoding="utf-8"))
    info["labels"] = ["a", "b", "c", "d"]
    for split in info["splits"].values():
        split["label_counts"] = dict(zip(info["labels"], split["label_counts"].values(), strict=True))
    (other / "corpus.json").write_text(json.dumps(info), encoding="utf-8")
    with pytest.raises(UserError, match=r"its labels are a, b, c, d; the model was trained on anger, calm"):
        running.evaluate_run(run, "test", str(other))
    assert not (run / "eval-holdout").exists()
