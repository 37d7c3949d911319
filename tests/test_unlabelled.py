"""Turns without a label: heard before those behind them, never trained on, scored or counted among the classes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
import yaml
from corpus_helpers import build_here, make_tables, run_tool, split_options, write_clip, write_table
from distributed import run_ranks
from helpers import planned_epoch, reader_of
from release_fixtures import make_iemocap
from rich.console import Console
from test_report import Page
from training_fixtures import RECIPE, train

from jointfuse.bench.data import benchmark_data
from jointfuse.capacity.corpus import corpus_of
from jointfuse.config import DataSettings, load_config
from jointfuse.data.columns import Weights
from jointfuse.data.corpora.iemocap import VIEWS, iemocap_corpus, read_release
from jointfuse.data.corpora.table import table_corpus
from jointfuse.data.dialogues import DialogueReader
from jointfuse.data.index import UNLABELLED, mel_statistics
from jointfuse.data.mel import MelSums
from jointfuse.data.mixture import AnyCorpus, MixedSplit, open_data, open_for_training
from jointfuse.data.plan import Plan
from jointfuse.data.shards import Corpus, read_sidecar
from jointfuse.data.tokenizer import train_tokenizer
from jointfuse.data.verify import verify
from jointfuse.errors import UserError
from jointfuse.evaluate.corpus_page import write_corpus_page

pytestmark = pytest.mark.required
SPLITS = ("train", "dev", "test")


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables in which every turn of fear has text and sound of another kind, the long clips of the corpus."""
    folder = tmp_path_factory.mktemp("tables")
    for split, rows in make_tables(folder).items():
        for row in rows:
            if row["emotion"] == "fear":
                row["text"] = f"zzzz {row['text']} zzzz"
                write_clip(folder / row["audio"], 1.5, pitch=3000.0)
        write_table(folder / f"{split}.csv", rows)
    return folder


def built(tables: Path, out: Path, **options: Any) -> Corpus:
    build_here(table_corpus([(split, tables / f"{split}.csv") for split in SPLITS], "tones", **options), out)
    return Corpus.open(out)


@pytest.fixture(scope="module")
def left_out(tables: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Everything labelled; `fear` is what data.labels leaves out of it."""
    return built(tables, tmp_path_factory.mktemp("left_out") / "corpus")


@pytest.fixture(scope="module")
def blank(tables: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tables, in which the label of fear is blank."""
    folder = tmp_path_factory.mktemp("blank")
    (folder / "wav").symlink_to(tables / "wav")
    for split in SPLITS:
        text = (tables / f"{split}.csv").read_text(encoding="utf-8")
        (folder / f"{split}.csv").write_text(text.replace(",fear,", ",,"), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def unlabelled(blank: Path) -> Corpus:
    return built(blank, blank / "corpus", unlabelled=True)


def read(corpus: Corpus, **settings: Any) -> AnyCorpus:
    labels = {"fear": None} if "fear" in corpus.labels else {}
    return open_data(DataSettings.model_validate({"corpus": str(corpus.path), "labels": labels} | settings))


# ----------------------------------------------------------------------------------------------------------- the corpus


def test_a_corpus_keeps_its_unlabelled_turns_and_counts_them_apart(unlabelled: Corpus, left_out: Corpus) -> None:
    assert unlabelled.labels == ["anger", "joy"]
    for name in SPLITS:
        split, other = unlabelled.split(name), left_out.split(name)
        without = np.flatnonzero(split.index["label"] == UNLABELLED)
        assert without.tolist() == np.flatnonzero(other.index["label"] == 1).tolist()
        entries = [entry for shard in split.shards for entry in read_sidecar(shard.with_suffix(".json"))["samples"]]
        for id in range(len(split)):
            utterance, twin = split.sample(id), other.sample(id)
            assert (utterance.key, utterance.text, utterance.turn) == (twin.key, twin.text, twin.turn)
            assert utterance.label == split.index["label"][id]
            if id in without:
                for held in (utterance.meta, entries[id]):
                    assert (held["label"], held["emotion"]) == (None, None)
        record, full = unlabelled.info["splits"][name], left_out.info["splits"][name]
        assert record.get("unlabelled", 0) == len(without)
        assert "unlabelled" not in full
        assert record["samples"] == full["samples"] == len(split)
        assert record["label_counts"] == {label: full["label_counts"][label] for label in ("anger", "joy")}
    assert unlabelled.unlabelled
    assert not left_out.unlabelled


def test_webdataset_alone_reads_such_a_corpus(unlabelled: Corpus) -> None:
    shards = [str(path) for path in unlabelled.split("train").shards]
    metas = [json.loads(one["json"]) for one in webdataset.WebDataset(shards, shardshuffle=False, empty_check=False)]
    assert len(metas) == 20
    assert sum(meta["label"] is None for meta in metas) == unlabelled.info["splits"]["train"]["unlabelled"] > 0


def test_mel_statistics_are_of_labelled_clips_alone(unlabelled: Corpus) -> None:
    split, sums = unlabelled.split("train"), MelSums()
    for id in np.flatnonzero(split.index["label"] != UNLABELLED):
        clip = split.sample(int(id)).waveform
        assert clip is not None
        sums.add(clip)
    expected = mel_statistics([{"mel": {"count": sums.count, "sum": sums.sum, "squares": sums.squares}}])
    assert (unlabelled.mel_mean, unlabelled.mel_deviation) == pytest.approx(expected)
    of_one = read(unlabelled)
    assert (of_one.mel_mean, of_one.mel_deviation) == (unlabelled.mel_mean, unlabelled.mel_deviation)


def test_a_mixture_weighs_mel_statistics_by_labelled_seconds(unlabelled: Corpus, uneven_corpus: Corpus) -> None:
    mixed = open_data(
        DataSettings.model_validate({"mix": [{"corpus": str(c.path)} for c in (unlabelled, uneven_corpus)]})
    )
    sidecars = [
        read_sidecar(shard.with_suffix(".json"))
        for corpus in (unlabelled, uneven_corpus)
        for shard in corpus.split("train").shards
    ]
    assert (mixed.mel_mean, mixed.mel_deviation) == pytest.approx(mel_statistics(sidecars), rel=0.005)


def test_a_blank_label_is_refused_with_its_row_unless_it_is_meant(
    blank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("build_shards", "table", *split_options(blank), "--out", tmp_path / "out", "--workers", 1)
    status, _, err = run_tool(*command, capsys=capsys)
    assert status == 2
    lines = (blank / "train.csv").read_text().splitlines()
    first = next(number for number, line in enumerate(lines, 1) if ",," in line)
    assert f"train.csv row {first}: the label cell is blank; fill it, or give --unlabelled context" in err
    assert err.count("\n") == 1
    status, out, err = run_tool(*command, "--unlabelled", "context", capsys=capsys)
    assert status == 0, err
    number = Corpus.open(tmp_path / "out").info["splits"]["train"]["unlabelled"]
    assert f"train: 20 utterances ({number} without a label), 5 dialogues" in out


def test_a_split_without_any_label_is_refused(blank: Path, tmp_path: Path) -> None:
    rows = [
        line for line in (blank / "dev.csv").read_text().splitlines() if ",," in line or line.startswith("dialogue")
    ]
    (blank / "bare.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    spec = table_corpus([("train", blank / "train.csv"), ("dev", blank / "bare.csv")], "tones", unlabelled=True)
    with pytest.raises(UserError, match="no utterance of split 'dev' has a label; leave it out or label some"):
        build_here(spec, tmp_path / "out")


# --------------------------------------------------------------------------------------------------------- its readers


@pytest.mark.parametrize("settings", [{}, {"context": 3, "speakers": "names"}])
@pytest.mark.parametrize("modality", ["both", "text"])
def test_unlabelled_turns_and_labels_that_are_left_out_give_the_same_batches(
    modality: str, settings: dict[str, Any], unlabelled: Corpus, left_out: Corpus
) -> None:
    batches = []
    for corpus in (unlabelled, left_out):
        reader = reader_of(read(corpus), modality, **settings)
        assert isinstance(reader.split, MixedSplit)
        weights = Weights(reader.split, "class")
        plan = Plan(reader.positions((16, 16)), 4, 0, reader.split.shard_sizes, 8, weights)
        ids, valid = planned_epoch(plan, 1)
        keys = [[reader.split.key(id) for id in row] for row in ids.tolist()]
        read_batches = [reader.batch(one) for one in zip(ids, valid, strict=True)]
        batches.append((keys, [(b.labels.tolist(), b.tokens.tolist(), b.clips.tolist()) for b in read_batches]))
        assert reader.split.info["label_counts"] == {"anger": 7, "joy": 7}
        assert len(reader.split) == 14
    assert batches[0] == batches[1]


def test_an_unlabelled_turn_is_heard_before_the_turns_behind_it_and_its_length_counts(unlabelled: Corpus) -> None:
    split, own = read(unlabelled).split("train"), unlabelled.split("train")
    heard = 0
    reader = reader_of(read(unlabelled), "text", context=2)
    for id in range(len(split)):
        key = split.key(id)
        place = next(number for number in range(len(own)) if own.key(number) == key)
        turn = int(own.index[place]["turn"])
        before = [own.sample(number).text for number in range(max(place - turn, place - 2), place)]
        assert [one.text for one in split.turns_before(id, 2)] == before
        length = sum(map(len, before)) + int(own.index[place]["characters"])
        assert reader.positions((16, 16))[np.array([id])].tolist() == [length]
        heard += any("zzzz" in text for text in before)
    assert heard > 3


def test_a_tokenizer_is_learnt_from_labelled_texts_alone(unlabelled: Corpus, left_out: Corpus) -> None:
    vocabulary = train_tokenizer(read(unlabelled).split("train"), 300).get_vocab()
    assert not [entry for entry in vocabulary if "zz" in entry]
    assert vocabulary == train_tokenizer(read(left_out).split("train"), 300).get_vocab()


def test_dialogues_are_of_labelled_turns(unlabelled: Corpus, left_out: Corpus) -> None:
    one, other = (DialogueReader(reader_of(read(corpus), "both")) for corpus in (unlabelled, left_out))
    assert one.turns.tolist() == other.turns.tolist()
    assert one.turns.sum() == 14
    batch = one.batch((np.arange(len(one)), np.ones(len(one), dtype=bool)))
    assert sorted(batch.utterances.ids.tolist()) == list(range(14))


def test_a_plan_of_a_training_counts_labelled_utterances(unlabelled: Corpus, left_out: Corpus, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(json.dumps(RECIPE), encoding="utf-8")
    one, other = (
        corpus_of(load_config(str(recipe), [f"data.corpus={path}", *labels]), [5, 5])
        for path, labels in ((unlabelled.path, []), (left_out.path, ["data.labels={fear: null}"]))
    )
    assert one.counts == [7, 7]
    assert (one.counts, one.shares, one.mean) == (other.counts, other.shares, other.mean)


def test_the_loop_beside_ours_is_not_given_what_it_cannot_read(unlabelled: Corpus) -> None:
    with pytest.raises(UserError, match="has turns without a label, which the peer cannot read"):
        benchmark_data(unlabelled.path, 4, None, 1, None, Console())


def in_rank(tmp: Path, unlabelled: Path, left_out: Path) -> list[Any]:
    from jointfuse.evaluate.run import evaluate_run

    outcomes: list[Any] = []
    for name, corpus, labels in (("blank", unlabelled, {}), ("left", left_out, {"fear": None})):
        recipe = tmp / f"{name}.yaml"
        data = RECIPE["data"] | {"corpus": str(corpus), "labels": labels, "context": 2, "max_tokens": 40}
        recipe.write_text(yaml.safe_dump(RECIPE | {"data": data}), encoding="utf-8")
        trained = train(recipe, tmp / name, "train.steps=6", "train.batch=4", "model.modality=text")
        dev, test = (evaluate_run(tmp / name, split) for split in ("dev", "test"))
        assert test.folder == tmp / name / "eval-test", "its own corpus"
        outcomes.append((trained.losses.tolist(), dev.scores, test.scores))
    return outcomes


def test_a_training_and_its_scores_are_those_of_labels_that_are_left_out(
    unlabelled: Corpus, left_out: Corpus, tmp_path: Path
) -> None:
    ((one, other),) = run_ranks(1, in_rank, tmp_path / "ranks", tmp_path, unlabelled.path, left_out.path)
    assert one == other
    assert one[1]["samples"] == sum(unlabelled.info["splits"]["dev"]["label_counts"].values()) < 6
    assert open_for_training(DataSettings(corpus=str(unlabelled.path))).labels == ["anger", "joy"]


# ------------------------------------------------------------------------------------------- what tells about a corpus


def test_a_corpus_of_unlabelled_turns_verifies_and_what_contradicts_them_is_found(
    unlabelled: Corpus, blank: Path, tmp_path: Path
) -> None:
    assert not verify(unlabelled.path, workers=1).faults
    copy = built(blank, tmp_path / "corpus", unlabelled=True).path
    info = json.loads((copy / "corpus.json").read_text())
    del info["splits"]["dev"]["unlabelled"]
    info["splits"]["train"]["unlabelled"] += 1
    (copy / "corpus.json").write_text(json.dumps(info))
    sidecar = copy / "train" / "shard-000000.json"
    content = json.loads(sidecar.read_text())
    entry = next(one for one in content["samples"] if one["label"] is None)
    entry.update(label=0, emotion="anger")
    sidecar.write_text(json.dumps(content))
    tar = copy / "dev" / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes().replace(b'"emotion": null', b'"emotion":"fea"', 1))
    faults = "\n".join(verify(copy, workers=1).faults)
    assert f"sample {entry['key']} at byte {entry['offset']}: label is None, the sidecar says 0" in faults
    assert "emotion is 'fea', though there is no label" in faults
    assert "unlabelled of dev is 0, the sidecars say 2" in faults
    assert "index.bin: differs from the sidecars" in faults


def test_statistics_and_the_page_count_them_apart_and_shares_are_of_the_labelled(
    unlabelled: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run_tool("shard_stats", unlabelled.path, "--png", tmp_path / "a.png", capsys=capsys)
    assert status == 0, err
    lines = {line.split("│")[1].strip(): line for line in out.splitlines() if line.startswith("│")}
    assert [cell.strip() for cell in lines["without a label"].split("│")[2:5]] == ["6", "2", "0"]
    assert [cell.strip() for cell in lines["utterances"].split("│")[2:5]] == ["20", "6", "2"]
    assert f"7  {7 / 14:6.1%}" in lines["joy"]
    page = Page(write_corpus_page(unlabelled, tmp_path / "page.html").read_text(encoding="utf-8"))
    for expected in (f"7 · {7 / 14:.1%}", "Without a label", "share of what is in the split that has a label"):
        assert expected in page.text


# ------------------------------------------------------------------------------------------------------------- IEMOCAP

COUNTS = {"hap": 9, "sad": 9, "neu": 12, "ang": 9, "exc": 8, "fru": 6, "sur": 3, "xxx": 14}


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Corpus]:
    """A corpus of each view, all of one release."""
    folder = tmp_path_factory.mktemp("iemocap")
    release = read_release(make_iemocap(folder, COUNTS))
    for view in VIEWS:
        build_here(iemocap_corpus(release, view, view), folder / view)
    return {view: Corpus.open(folder / view) for view in VIEWS}


@pytest.mark.parametrize("view", ["six", "four"])
def test_the_context_of_iemocap_is_the_turns_before_whatever_their_labels(view: str, views: dict[str, Corpus]) -> None:
    whole = views["all"].split("train")
    spoken = {whole.key(id): [turn.text for turn in whole.turns_before(id, 3)] for id in range(len(whole))}
    split = read(views[view]).split("train")
    for id in range(len(split)):
        before = split.turns_before(id, 3)
        assert [turn.text for turn in before] == spoken[split.key(id)]
        assert len(before) == min(3, split.sample(id, audio=False).turn)
    assert any(turn.meta["label"] is None for id in range(len(split)) for turn in split.turns_before(id, 3))


@pytest.mark.parametrize("view", ["six", "four"])
def test_a_view_of_iemocap_is_all_labels_renamed_and_left_out_by_data_labels(
    view: str, views: dict[str, Corpus]
) -> None:
    classes = VIEWS[view]
    renamed = {name: classes.get(code) for code, name in VIEWS["all"].items() if name != classes.get(code)}
    settings = DataSettings.model_validate({"corpus": str(views["all"].path), "labels": renamed})
    one, other = read(views[view]), open_data(settings, views[view].labels)
    wanted = sum(COUNTS.get(code, 0) for code in classes)
    assert sum(len(one.split(name)) for name in SPLITS) == wanted
    for name in SPLITS:
        assert one.split(name).info["label_counts"] == other.split(name).info["label_counts"]
        epochs = []
        for corpus in (one, other):
            reader = reader_of(corpus, "audio", split=name)
            positions = reader.positions((16, 16))
            ids, _ = planned_epoch(Plan(positions, 4, 0, reader.split.shard_sizes), 0)
            assert ids.tolist() == planned_epoch(Plan(positions, 4, 0), 0)[0].tolist(), "whatever lies in which shard"
            epochs.append([reader.split.key(id) for id in ids.ravel().tolist()])
        assert epochs[0] == epochs[1]
