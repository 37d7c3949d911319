"""Several corpora read as one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import run_ranks
from helpers import build_corpus, planned_epoch, reader_of
from hypothesis import given
from hypothesis import strategies as st
from training_fixtures import RECIPE, Trained, train

from jointfuse.config import DataSettings, load_config
from jointfuse.data.columns import Weights
from jointfuse.data.index import mel_statistics
from jointfuse.data.mixture import AnyCorpus, MixedSplit, Mixture, open_data
from jointfuse.data.plan import Plan
from jointfuse.data.shards import Corpus, read_sidecar
from jointfuse.errors import UserError

OTHER_LABELS = ("bored", "joy", "mad", "neutral")
NAMED = {"mad": "anger", "bored": None, "neutral": "calm"}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Labels of other names and in another order, of other sizes, with a test split."""
    sizes = {"train": 14, "dev": 5, "test": 6}
    return build_corpus(
        tmp_path_factory.mktemp("other") / "corpus", samples_per_shard=4, labels=OTHER_LABELS, sizes=sizes
    )


def mixed(*corpora: Corpus, labels: dict[str, str | None] | None = None, weights: tuple[float, ...] = ()) -> AnyCorpus:
    mix: list[dict[str, Any]] = [{"corpus": str(corpus.path)} for corpus in corpora]
    for one, weight in zip(mix, weights, strict=False):
        one["weight"] = weight
    return open_data(DataSettings.model_validate({"mix": mix, "labels": labels or {}}))


def literal(split: str, *corpora: Corpus, labels: dict[str, str | None]) -> list[tuple[str, str, str, bytes | None]]:
    """(key, label, text, clip) of every utterance in turn, those left out aside."""
    found = []
    for corpus in corpora:
        if split not in corpus.splits:
            continue
        own = corpus.split(split)
        for id in range(len(own)):
            utterance = own.sample(id, audio=False)
            label = labels.get(corpus.labels[utterance.label], corpus.labels[utterance.label])
            if label is not None:
                found.append((utterance.key, label, utterance.text, own.audio_bytes(id)))
    return found


@pytest.mark.parametrize("labels", [{}, NAMED])
@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_a_mixture_has_the_utterances_of_its_corpora_under_one_set_of_labels(
    split: str, labels: dict[str, str | None], uneven_corpus: Corpus, other: Corpus
) -> None:
    corpus = mixed(uneven_corpus, other, labels=labels)
    names = ["anger", "fear", "joy", "calm"] if labels else ["anger", "fear", "joy", "neutral", "bored", "mad"]
    assert corpus.labels == names
    found = corpus.split(split)
    expected = literal(split, uneven_corpus, other, labels=labels)
    assert len(found) == len(expected)
    for id, (key, label, text, clip) in enumerate(expected):
        utterance = found.sample(id)
        assert (utterance.key, corpus.labels[utterance.label], utterance.text) == (key, label, text)
        assert found.key(id) == key
        assert found.audio_bytes(id) == clip
        assert utterance.waveform is not None
        entry = found.index[id]
        assert names[entry["label"]] == label
        assert entry["characters"] == len(text)
        assert entry["duration_ms"] == round(len(utterance.waveform) / 16)
    assert found.info["label_counts"] == {name: sum(label == name for _, label, *_ in expected) for name in names}
    np.testing.assert_array_equal(found.shard_sizes, np.bincount(found.index["shard"]))
    assert (np.diff(found.index["dialogue"].astype(int)) >= 0).all()
    assert (np.diff(found.index["shard"].astype(int)) >= 0).all()


def test_a_corpus_keeps_its_label_numbers_unless_labels_are_given(uneven_corpus: Corpus) -> None:
    alone = DataSettings(corpus=str(uneven_corpus.path))
    assert isinstance(open_data(alone), Corpus)
    assert isinstance(open_data(alone, uneven_corpus.labels), Corpus)
    named = open_data(alone.model_copy(update={"labels": {"fear": None, "anger": "joy"}}))
    assert isinstance(named, Mixture)
    assert named.labels == ["joy", "neutral"]
    counts = uneven_corpus.split("train").info["label_counts"]
    assert named.split("train").info["label_counts"] == {
        "joy": counts["joy"] + counts["anger"],
        "neutral": counts["neutral"],
    }
    of_model = open_data(alone, ["bored", "neutral", "joy", "fear", "anger"])
    split = of_model.split("dev")
    own = uneven_corpus.split("dev")
    for id in range(len(own)):
        assert of_model.labels[split.sample(id).label] == uneven_corpus.labels[own.sample(id).label]


def test_what_is_left_out_is_context_still(uneven_corpus: Corpus, other: Corpus) -> None:
    split = mixed(uneven_corpus, other, labels=NAMED).split("train")
    own = other.split("train")
    id = len(split) - 1
    assert [turn.key for turn in split.turns_before(id, 3)] == [
        own.key(before) for before in range(len(own)) if own.index[before]["dialogue"] == own.index[-1]["dialogue"]
    ][: int(split.sample(id).turn)]
    assert any(turn.meta["emotion"] == "bored" for n in range(len(split)) for turn in split.turns_before(n, 3))


def test_batches_are_those_of_the_corpora_read_alone(uneven_corpus: Corpus, other: Corpus) -> None:
    corpus = mixed(uneven_corpus, other)
    reader = reader_of(corpus, "both", context=2)
    ids = np.array([0, 24, 36, 22])
    batch = reader.batch((ids, np.ones(4, dtype=bool)))
    for row, (source, id) in enumerate([(uneven_corpus, 0), (other, 1), (other, 13), (uneven_corpus, 22)]):
        alone = reader_of(source, "both", context=2)
        alone.tokenizer = reader.tokenizer
        one = alone.batch((np.array([id]), np.ones(1, dtype=bool)))
        assert batch.tokens[row][batch.token_mask[row]].tolist() == one.tokens[0].tolist()
        assert batch.clips[row, : one.clips.shape[1]].tolist() == one.clips[0].tolist()
        assert corpus.labels[batch.labels[row]] == source.labels[one.labels[0]]
    positions = reader.positions((16, 16))[ids]
    assert positions.tolist() == [-(-int(frames) // 16) * 5 for frames in batch.frames]


def test_mel_statistics_are_those_of_all_training_clips(uneven_corpus: Corpus, other: Corpus) -> None:
    corpus = mixed(uneven_corpus, other)
    sidecars = [
        read_sidecar(shard.with_suffix(".json"))
        for source in (uneven_corpus, other)
        for shard in source.split("train").shards
    ]
    assert (corpus.mel_mean, corpus.mel_deviation) == pytest.approx(mel_statistics(sidecars), rel=0.01)


@given(
    st.lists(st.integers(1, 60), min_size=2, max_size=12),
    st.lists(st.floats(0.1, 10), min_size=3, max_size=3),
    st.integers(1, 400),
    st.integers(0, 2**30),
)
def test_corpora_have_their_shares_of_an_epoch_whatever_the_blocks(
    shards: list[int], weights: list[float], block: int, seed: int
) -> None:
    corpus_of = np.repeat(np.arange(len(shards)) % 3, shards)
    weight_of = np.array([weights[c] / max(1, (corpus_of == c).sum()) for c in corpus_of])
    plan = Plan(np.ones(len(corpus_of)), 7, seed, shards, block, weight_of)
    ids, valid = planned_epoch(plan, 1)
    assert valid.sum() == len(corpus_of)
    drawn = np.bincount(corpus_of[ids[valid]], minlength=3)
    expected = np.array([weight_of[corpus_of == c].sum() for c in range(3)]) * len(corpus_of) / weight_of.sum()
    # One for the rounding of a block's draws, one for that of a corpus within it.
    assert (np.abs(drawn - expected) <= 2 * len(shards)).all()


@pytest.mark.parametrize("block", [4, 2**16])
@pytest.mark.parametrize("balance", ["none", "sqrt", "class"])
def test_weights_are_shares_and_balance_acts_on_what_they_make_of_the_classes(
    balance: Any, block: int, uneven_corpus: Corpus, other: Corpus
) -> None:
    split = mixed(uneven_corpus, other, labels={"mad": "anger", "bored": "fear"}, weights=(1, 3)).split("train")
    assert isinstance(split, MixedSplit)
    everything = np.arange(len(split))
    weights = Weights(split, balance)[everything]
    assert weights.sum() == pytest.approx(len(split))
    of_corpus, label = everything >= 23, split.index["label"]
    mass = np.where(of_corpus, 3 / 14, 1 / 23)  # of an utterance, before balance
    number = np.bincount(label, mass)
    found = np.bincount(label, weights)
    wanted = {"none": number, "sqrt": np.sqrt(number), "class": np.ones(4)}[balance]
    np.testing.assert_allclose(found / found.sum(), wanted / wanted.sum())
    for c in range(4):
        np.testing.assert_allclose((weights / mass)[label == c], (weights / mass)[label == c][0])
    if balance == "none":
        assert weights[of_corpus].sum() == pytest.approx(len(split) * 3 / 4)
    ids, valid = planned_epoch(Plan(np.ones(37), 5, 0, split.shard_sizes, block, Weights(split, balance)), 0)
    assert valid.sum() == 37
    assert 0 <= ids.min() <= ids.max() < 37


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"corpus": "a", "mix": [{"corpus": "b"}]}, "either corpus (and remote) or mix"),
        ({"mix": [{"corpus": "b"}], "remote": "pipe:cat {shard}"}, "either corpus (and remote) or mix"),
        ({"mix": [{"corpus": "b"}, {"corpus": "b"}]}, "mix names a corpus twice"),
        ({"mix": [{"corpus": "b", "weight": 1}, {"corpus": "c"}]}, "give it to all or to none"),
        ({"mix": [{"corpus": "b", "weight": 0}]}, "data.mix.0.weight = 0"),
        ({"mix": [{"corpus": "b", "wieght": 1}]}, "unknown setting 'data.mix.0.wieght', did you mean"),
        ({"mix": [{"weight": 1}]}, "data.mix.0.corpus: Field required"),
    ],
)
def test_a_mixture_that_says_two_things_is_refused(settings: dict[str, Any], expected: str, tmp_path: Path) -> None:
    path = tmp_path / "mixed.yaml"
    path.write_text(json.dumps(RECIPE | {"data": settings}))
    with pytest.raises(UserError) as caught:
        load_config(str(path))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_corpus_and_mix_replace_each_other_as_overrides(tmp_path: Path) -> None:
    path = tmp_path / "mixed.yaml"
    path.write_text(json.dumps(RECIPE | {"data": {"corpus": "a"}}))
    data = load_config(str(path), ["data.mix=[{corpus: b, weight: 2}, {corpus: c, weight: 1}]"]).data
    assert (data.corpus, [one.corpus for one in data.mix]) == ("", ["b", "c"])
    path.write_text(json.dumps(RECIPE | {"data": {"mix": [{"corpus": "b"}]}}))
    data = load_config(str(path), ["data.corpus=a"]).data
    assert (data.corpus, data.mix) == ("a", [])


def test_labels_that_no_corpus_has_and_splits_that_are_empty_are_named(uneven_corpus: Corpus, other: Corpus) -> None:
    with pytest.raises(UserError, match=r"data.labels: no corpus has a label 'joi'; there are anger, fear, joy"):
        mixed(uneven_corpus, other, labels={"joi": "joy"})
    with pytest.raises(UserError, match=r"data.labels leaves out every utterance"):
        mixed(uneven_corpus, labels=dict.fromkeys(uneven_corpus.labels)).split("train")
    with pytest.raises(UserError, match=r"no split 'valid'; there are train, dev, test"):
        mixed(uneven_corpus, other).split("valid")
    with pytest.raises(UserError, match=r"its labels are bored, joy, mad, neutral; the model was trained on anger"):
        open_data(DataSettings(corpus=str(other.path)), uneven_corpus.labels)


def in_ranks(recipe: Path, folder: Path, other: Path) -> tuple[Trained, list[str]]:
    from jointfuse.evaluate.run import evaluate_run

    run = folder / "run"
    trained = train(recipe, run, "train.steps=8", "data.context=1")
    result = evaluate_run(run, "dev").scores
    alone = evaluate_run(run, "test", str(other)).scores
    assert result["samples"] == 7 + 5 - sum(np.asarray(Corpus.open(other).split("dev").index["label"]) == 0)
    return trained, [*alone["names"], str(alone["samples"])]


@pytest.mark.required
def test_a_mixture_trains_resumes_and_is_scored_alone_and_together(
    uneven_corpus: Corpus, other: Corpus, tmp_path: Path
) -> None:
    recipe = tmp_path / "mixed.yaml"
    mix = [{"corpus": str(uneven_corpus.path), "weight": 1.0}, {"corpus": str(other.path), "weight": 2.0}]
    data = RECIPE["data"] | {"mix": mix, "labels": NAMED, "balance": "sqrt"}
    recipe.write_text(json.dumps(RECIPE | {"data": data}))
    ranks = run_ranks(2, in_ranks, tmp_path / "ranks", recipe, tmp_path, other.path)
    trained, alone = ranks[0]
    assert len(trained.losses) == 8
    assert np.isfinite(trained.losses).all()
    left = sum(label != 0 for label in other.split("test").index["label"])
    assert alone == ["anger", "fear", "joy", "calm", str(left)]

    from jointfuse.train.checkpoint import check_resumable
    from jointfuse.train.whole import latest_checkpoint

    checkpoint = latest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    overrides = ["train.steps=8", "data.context=1"]
    config = load_config(str(recipe), overrides)
    assert check_resumable(checkpoint, config, 2, open_data(config.data)).step == 8
    mix[1]["weight"] = 3.0
    changed = load_config(str(recipe), [*overrides, f"data.mix={json.dumps(mix)}"])
    with pytest.raises(UserError, match="written on another corpus"):
        check_resumable(checkpoint, changed, 2, open_data(changed.data))
