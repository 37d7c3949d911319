"""Texts alone: no clip is read or decoded for them. And training where some cannot be read."""

import os
import shutil
import tarfile
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus_helpers import build_here, write_clip, write_table
from distributed import run_ranks
from helpers import reader_of
from training_fixtures import SIZES, Trained, corpus, recipe, train

from jointfuse.data import samples
from jointfuse.data.corpora.table import table_corpus
from jointfuse.data.mixture import Mixture
from jointfuse.data.shards import Corpus
from jointfuse.data.texts import last_text, most_bytes_of
from jointfuse.data.tokenizer import train_tokenizer
from jointfuse.errors import UserError

__all__ = ["corpus", "recipe"]

pytestmark = pytest.mark.required
SPOILT = 5  # the utterance of train whose text is none in `spoilt`
HEADER = tarfile.TarInfo("in.txt")
HEADER.size = 3
TEXTS = [
    "plain",
    "Zürich, naïve: 你好 😀",
    "x" * 511 + "é",
    "y" * 512,
    "z" * 2000,
    # What looks like a member of a tar, where one could begin.
    "a" * 512 + HEADER.tobuf().decode() + "end",
    "b",
]


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Texts of many lengths and scripts, one under a key that a plain header cannot hold, one missing."""
    folder = tmp_path_factory.mktemp("odd")
    rows = [
        {"dialogue": "d" * (150 if text == "b" else 1), "turn": turn, "text": text}
        for turn, text in enumerate([*TEXTS, ""])
    ]
    for name in ("joy", "fear"):
        write_clip(folder / f"{name}.wav", seconds=2.0)
    rows = [row | {"emotion": name, "audio": f"{name}.wav"} for row, name in zip(rows, cycle(("joy", "fear")))]
    table = write_table(folder / "train.csv", rows)
    build_here(table_corpus([("train", table)], "odd", allow_missing=True), folder / "corpus")
    return Corpus.open(folder / "corpus")


def test_a_text_is_what_the_whole_sample_says(odd: Corpus) -> None:
    split, mixed = odd.split("train"), Mixture([(odd, None), (odd, None)], {}).split("train")
    expected = [split.sample(id).text for id in range(len(split))]
    assert sorted(expected) == sorted([*TEXTS, ""])
    assert [split.text(id) for id in range(len(split))] == expected
    assert [mixed.text(id) for id in range(len(mixed))] == expected * 2


def test_the_last_bytes_of_anything_else_are_no_text(odd: Corpus) -> None:
    split = odd.split("train")
    data = split.read(0)
    characters = int(split.index[0]["characters"])
    assert last_text(data[-most_bytes_of(characters) :], characters) == split.text(0)
    assert last_text(data[: -tarfile.BLOCKSIZE], characters) is None
    assert last_text(data, characters + 1) is None
    assert last_text(data.replace(b".txt", b".tyt"), characters) is None
    assert last_text(b"", 1) is None


def test_a_tokenizer_is_trained_without_a_clip_read_or_decoded(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = Corpus.open(corpus).split("train")
    expected = [split.sample(id, audio=False).text for id in range(len(split))]
    sizes: list[int] = []
    pread = os.pread

    def counted(descriptor: int, size: int, offset: int) -> bytes:
        sizes.append(size)
        return pread(descriptor, size, offset)

    def refuse(data: bytes) -> Any:
        raise AssertionError("a clip was decoded")

    monkeypatch.setattr(os, "pread", counted)
    monkeypatch.setattr(samples, "decode_flac", refuse)
    assert [split.text(id) for id in range(len(split))] == expected
    sizes.clear()
    train_tokenizer(split, 300)
    assert len(sizes) == len(split)
    assert sum(sizes) < 0.1 * int(split.index["size"].sum())


def spoil_a_text(corpus: Path, id: int) -> str:
    """Make one text of train no text at all; its key."""
    split = Corpus.open(corpus).split("train")
    entry = split.index[id]
    with split.shards[int(entry["shard"])].open("r+b") as tar:
        tar.seek(int(entry["offset"]) + int(entry["size"]) - tarfile.BLOCKSIZE)
        tar.write(b"\xff")
    return split.key(id)


@pytest.fixture(scope="module")
def spoilt(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The corpus with one text of train that is none, and its key; two turns of its dialogue follow."""
    copied = Path(shutil.copytree(corpus, tmp_path_factory.mktemp("spoilt") / "corpus"))
    return copied, spoil_a_text(copied, SPOILT)


def trainings(recipe: Path, spoilt: Path, folder: Path) -> tuple[Trained, str, str]:
    """One that skips, and what those say that do not or that skip too much."""
    settings = (f"data.corpus={spoilt}", "data.context=1", "train.epochs=1", "train.steps=null")
    refusals = []
    for name, more in (("fails", "fail"), ("skips too much", "skip")):
        with pytest.raises(UserError) as caught:
            train(recipe, folder / name, *settings, f"data.on_error={more}", "data.most_skipped=0")
        refusals.append(str(caught.value))
        assert not (folder / name).exists()
    skipping = train(recipe, folder / "skips", *settings, "data.on_error=skip", "data.most_skipped=0.2")
    return skipping, *refusals


@pytest.fixture(scope="module")
def trained(
    recipe: Path, spoilt: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[tuple[Trained, str, str], Path]:
    folder = tmp_path_factory.mktemp("texts")
    return run_ranks(2, trainings, folder / "ranks", recipe, spoilt[0], folder)[0], folder


def test_an_unreadable_text_is_left_out_of_the_tokenizer_and_named_or_ends_the_run(
    trained: tuple[tuple[Trained, str, str], Path], spoilt: tuple[Path, str]
) -> None:
    (_, fails, too_much), folder = trained
    assert f"sample {spoilt[1]} at byte" in fails
    assert too_much.startswith(f"1 of {SIZES['train']} texts cannot be read, more than data.most_skipped = 0.0; ")
    assert spoilt[1] in too_much
    said = (folder / "ranks" / "rank0.log").read_text(encoding="utf-8")
    named = folder / "skips" / "skipped.jsonl"
    assert f"1 texts could not be read and are not in the tokenizer; {named} names them" in said
    first, *_ = named.read_text(encoding="utf-8").splitlines()
    assert '"step": 0' in first
    assert spoilt[1] in first


def test_an_utterance_whose_context_cannot_be_read_is_skipped_and_both_are_named(
    trained: tuple[tuple[Trained, str, str], Path], spoilt: tuple[Path, str], corpus: Path
) -> None:
    (run, *_), folder = trained
    next_key = Corpus.open(corpus).split("train").key(SPOILT + 1)
    assert sum(row["skipped"] for row in run.rows if row["kind"] == "train") == 2
    lines = (folder / "skips" / "skipped.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    assert len(lines) == 2
    assert all(spoilt[1] in line for line in lines)
    assert sum(f"a turn before sample {next_key}" in line for line in lines) == 1


@pytest.mark.parametrize("context", [0, 1, 3])
def test_what_is_skipped_for_its_context_counts_no_more_and_others_are_as_they_were(
    context: int, corpus: Path, spoilt: tuple[Path, str]
) -> None:
    whole = reader_of(Corpus.open(corpus), "both", on_error="skip", context=context)
    less = reader_of(Corpus.open(corpus), "both", on_error="skip", context=context)
    less.split = Corpus.open(spoilt[0]).split("train")
    planned = (np.arange(12), np.ones(12, dtype=bool))
    expected, found = (reader.for_training(reader.augmentation).batch(planned) for reader in (whole, less))
    lost = {id for id in range(SPOILT, 8) if id - SPOILT <= context}  # a dialogue has four turns
    assert np.flatnonzero(~found.valid.numpy()).tolist() == sorted(lost)
    assert len(found.skipped) == len(lost)
    for id in set(range(12)) - lost:
        for name in ("tokens", "token_mask"):
            ours, theirs = getattr(found, name)[id], getattr(expected, name)[id]
            assert ours.tolist() == theirs.tolist()[: len(ours)]
    with pytest.raises(UserError, match=spoilt[1]):
        less.batch(planned)
