"""train.init_from: a run that starts from an exported model starts with all of it: tokenizer, mel statistics, heads."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from corpus_helpers import build_here
from distributed import run_ranks
from helpers import make_network, model_settings
from test_network import exported
from training_fixtures import LABELS, corpus, make_corpus, outcome, recipe, train, trainer

from jointfuse.data.corpora.table import table_corpus
from jointfuse.data.shards import Corpus
from jointfuse.errors import UserError
from jointfuse.evaluate import run as evaluating
from jointfuse.evaluate.predict import predict
from jointfuse.model.export import initialise, load_model
from jointfuse.model.network import Network

__all__ = ["corpus", "recipe"]

pytestmark = pytest.mark.required
OTHER_ORDER = ("joy", "fear", "calm", "anger")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other words, softer clips, and the labels in another order."""
    folder = tmp_path_factory.mktemp("other")
    make_corpus(folder)
    for wav in (folder / "wav").iterdir():
        clip, rate = soundfile.read(wav)
        soundfile.write(wav, 0.1 * clip, rate)
    tables = []
    for split in ("train", "dev", "test"):
        table = folder / f"{split}.csv"
        table.write_text(table.read_text(encoding="utf-8").replace("and", "whatever").replace("so", "hmm"), "utf-8")
        tables.append((split, table))
    build_here(table_corpus(tables, "other", labels=OTHER_ORDER), folder / "elsewhere")
    return folder / "elsewhere"


def started(recipe: Path, other: Path, folder: Path) -> dict[str, Any]:
    train(recipe, folder / "first", "train.steps=6", "train.lr=5e-3")
    start, found = folder / "first" / "best", dict[str, Any]()
    settings = (f"data.corpus={other}", f"train.init_from={start}", "train.steps=4", "train.save_every=2 steps")
    with trainer(recipe, folder / "second", *settings) as made:
        found["vocabulary"] = made.tokenizer.get_vocab(), load_model(start).tokenizer.get_vocab()
        found["logits"] = predict(made.engine.module.network, made.dev_reader, 0).logits
        seen: list[Any] = []
        real = evaluating.predict
        evaluating.predict = lambda *arguments: seen.append(real(*arguments)) or seen[-1]
        try:
            evaluating.evaluate_run(folder / "first", "dev", str(other))
        finally:
            evaluating.predict = real
        found["scored"] = seen[0].logits
        made.train()
        found["whole"] = outcome(made)
    train(recipe, folder / "stopped", *settings, stop_after=2)
    if made.rank == 0:
        start.rename(start.with_name("gone"))
    torch.distributed.barrier()
    found["resumed"] = train(recipe, folder / "stopped", *settings, resume=True)
    with pytest.raises(UserError) as caught, trainer(recipe, folder / "third", *settings):
        pass
    found["gone"] = str(caught.value)
    return found


@pytest.fixture(scope="module")
def runs(recipe: Path, other: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("init")
    return run_ranks(2, started, folder / "ranks", recipe, other, folder)[0], folder


def test_at_step_0_the_numbers_are_those_of_the_exported_model(runs: tuple[dict[str, Any], Path]) -> None:
    own = [LABELS.index(label) for label in OTHER_ORDER]
    assert np.abs(runs[0]["logits"] - runs[0]["scored"][:, own]).max() < 1e-5
    assert runs[0]["logits"].std(axis=0).min() > 0.01, "the utterances differ to the model"


def test_the_tokenizer_and_the_mel_statistics_come_along_to_the_next_export(
    runs: tuple[dict[str, Any], Path], corpus: Path, other: Path
) -> None:
    found, folder = runs
    assert found["vocabulary"][0] == found["vocabulary"][1]
    mels = [json.loads((folder / run / "best" / "model.json").read_text())["mel"] for run in ("second", "stopped")]
    first = Corpus.open(corpus)
    assert mels == [{"mean": first.mel_mean, "deviation": first.mel_deviation}] * 2
    assert abs(Corpus.open(other).mel_mean - first.mel_mean) > 1, "the other corpus has its own"


def test_a_run_goes_on_as_it_began_when_the_export_has_gone(runs: tuple[dict[str, Any], Path]) -> None:
    found = runs[0]
    np.testing.assert_allclose(found["resumed"].losses, found["whole"].losses, atol=2e-6)
    assert "no exported model here" in found["gone"]


def test_heads_are_matched_by_the_names_of_their_classes(tmp_path: Path) -> None:
    source = exported(tmp_path / "best", model_settings()).state_dict()
    network = make_network(model_settings(), seed=2)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert initialise(network, tmp_path / "best", ["neutral", "bored", "anger", "fear"]) == ["bored"]
    for name, tensor in network.state_dict().items():
        if "_head." not in name:
            torch.testing.assert_close(tensor, source[name], rtol=0, atol=0)
            continue
        torch.testing.assert_close(tensor[[0, 2, 3]], source[name][[3, 0, 1]], rtol=0, atol=0)
        torch.testing.assert_close(tensor[1], before[name][1], rtol=0, atol=0)


def test_a_model_of_more_or_fewer_classes_takes_over_those_it_shares(tmp_path: Path) -> None:
    source = exported(tmp_path / "best", model_settings()).state_dict()
    for labels in (["joy", "anger"], ["a", "joy", "b", "c", "anger", "d"]):
        network = Network(model_settings(), len(labels), 48, 6.0, tokenizer_size=300)
        assert initialise(network, tmp_path / "best", labels) == [one for one in labels if len(one) == 1]
        for name in ("text_head.weight", "text_head.bias", "audio_head.weight", "audio_head.bias"):
            rows = [labels.index("joy"), labels.index("anger")]
            torch.testing.assert_close(network.state_dict()[name][rows], source[name][[2, 0]], rtol=0, atol=0)
