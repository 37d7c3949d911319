"""From the plan to batches: order, truncation, damage, whatever the number of workers."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SIZES, example_of, read, reader_of
from running import until

from jointfuse.config import DataSettings
from jointfuse.data.batch import HostBatch, collate
from jointfuse.data.features import continued
from jointfuse.data.plan import Plan, Planned, evaluation_batches
from jointfuse.data.reader import UtteranceReader
from jointfuse.data.shards import Corpus
from jointfuse.data.stream import stream
from jointfuse.data.tokenizer import train_tokenizer
from jointfuse.errors import UserError


def planned(reader: UtteranceReader, rank: int = 0) -> list[Planned]:
    """What one of two ranks holds in an epoch of batches of 8 in two accumulation steps; the last is mostly filled."""
    return list(Plan(reader.positions((16, 16)), 8, seed=1).share(3, 0, 2, rank, 2))


@pytest.fixture(scope="module")
def reader(uneven_corpus: Corpus) -> UtteranceReader:
    return reader_of(uneven_corpus, "both")


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_come_in_the_order_of_the_plan_whatever_the_number_of_workers(
    workers: int, reader: UtteranceReader
) -> None:
    for rank in range(2):
        plan = planned(reader, rank)
        batches = list(stream(reader, plan, workers))
        assert [batch.ids.tolist() for batch in batches] == [ids.tolist() for ids, _ in plan]
        assert [batch.valid.tolist() for batch in batches] == [valid.tolist() for _, valid in plan]
        for batch, expected in zip(batches, plan, strict=True):
            same(batch, reader.batch(expected))


def same(one: HostBatch, other: HostBatch) -> None:
    for name in ("tokens", "token_mask", "clips", "frames", "labels"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=0)
    assert (one.cut_tokens, one.cut_audio) == (other.cut_tokens, other.cut_audio)


def test_evaluation_over_ranks_reads_the_split_once(reader: UtteranceReader) -> None:
    seen = []
    for rank in range(3):
        lengths = reader.split.index["duration_ms"]
        for batch in stream(reader, evaluation_batches(lengths, 4, 3, rank), 0):
            seen += batch.ids[batch.valid].tolist()
    assert sorted(seen) == list(range(SIZES["train"]))


def test_what_comes_is_what_the_corpus_holds(reader: UtteranceReader) -> None:
    for batch in stream(reader, planned(reader), 0):
        for row, id in enumerate(batch.ids.tolist()):
            utterance = reader.split.sample(id)
            assert utterance.waveform is not None
            assert batch.labels[row] == utterance.label
            assert batch.frames[row] == 1 + len(utterance.waveform) // 160
            tokens = batch.tokens[row][batch.token_mask[row]]
            assert reader.tokenizer is not None
            assert reader.tokenizer.decode(tokens, skip_special_tokens=True).strip() == utterance.text.lower()


def test_collate_pads_behind_each_utterance_and_marks_what_is_real(reader: UtteranceReader) -> None:
    examples = [example_of(reader, id) for id in (1, 0, 7)]
    batch = collate(examples, np.array([True, False, True]), pad_token=1)
    assert batch.ids.tolist() == [1, 0, 7]
    assert batch.valid.tolist() == [True, False, True]
    assert batch.frames.tolist() == [601, 21, 26]  # 6, 0.2 and 0.25 seconds
    for row, example in enumerate(examples):
        samples, tokens = len(example.clip), len(example.tokens)
        assert np.array_equal(batch.clips[row, : samples + 512], continued(example.clip))
        assert np.array_equal(batch.clips[row, 256 : 256 + samples], example.clip)
        assert (batch.clips[row, samples + 512 :] == 0).all()
        assert batch.token_mask[row].tolist() == [place < tokens for place in range(batch.tokens.shape[1])]
        assert batch.tokens[row, :tokens].tolist() == example.tokens.tolist()
        assert (batch.tokens[row, tokens:] == 1).all()
        assert batch.tokens[row, 0] == 0, "[CLS] is token 0"
    assert batch.tokens.shape[1] == max(len(example.tokens) for example in examples)


def test_positions_are_those_that_the_batches_have(gapped_corpus: Corpus, uneven_corpus: Corpus) -> None:
    reader = reader_of(gapped_corpus, "both", missing_modality="allow")
    for bins, frames in ((16, 16), (80, 7)):
        positions = reader.positions((bins, frames))[:]
        for id, expected in enumerate(positions.tolist()):
            batch = reader.batch((np.array([id]), np.array([True])))
            assert expected == -(-int(batch.frames[0]) // frames) * (80 // bins)
    text = reader_of(uneven_corpus, "text")
    assert text.positions((16, 16))[:].tolist() == text.split.index["characters"].tolist()
    cut = UtteranceReader(
        reader.split, DataSettings(max_seconds=1.3, missing_modality="allow"), reader.tokenizer, True, 0.0, 1.0
    )
    assert cut.positions((16, 16))[:].max() == -(-131 // 16) * 5


def test_mel_values_are_those_of_the_training_set_normalised(uneven_corpus: Corpus) -> None:
    reader = reader_of(uneven_corpus, "audio")
    batch = read(reader, range(SIZES["train"]))
    values = torch.cat([mel[:frames].flatten() for mel, frames in zip(batch.mel, batch.frames, strict=True)])
    assert values.mean().item() == pytest.approx(0, abs=0.01)  # known from an eighth of the frames
    assert values.std().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("workers", [0, 1])
def test_long_clips_and_texts_are_cut_and_counted_where_they_count(workers: int, uneven_corpus: Corpus) -> None:
    split = uneven_corpus.split("train")
    tokenizer = train_tokenizer(split, 300)
    settings = DataSettings(max_seconds=1.3, max_tokens=9)
    reader = UtteranceReader(split, settings, tokenizer, True, 0.0, 1.0)
    whole = [len(tokenizer(split.sample(id).text)["input_ids"]) for id in range(SIZES["train"])]
    seconds = split.index["duration_ms"] / 1000
    assert 1.3 in seconds, "a clip as long as allowed is not cut"
    texts = clips = 0
    for batch in stream(reader, planned(reader), workers):
        held = [id for id, counts in zip(batch.ids.tolist(), batch.valid.tolist(), strict=True) if counts]
        assert batch.cut_tokens == sum(whole[id] > 9 for id in held)
        assert batch.cut_audio == sum(seconds[id] > 1.3 for id in held)
        texts, clips = texts + batch.cut_tokens, clips + batch.cut_audio
        assert batch.clips.shape[1] <= 1.3 * 16_000 + 512
        for row, id in enumerate(batch.ids.tolist()):
            tokens = batch.tokens[row][batch.token_mask[row]].tolist()
            assert len(tokens) == min(9, whole[id])
            assert (tokens[0], tokens[-1]) == (0, 2), "a cut text ends as a whole one does"
            assert batch.frames[row] == 1 + round(min(1.3, seconds[id]) * 16_000) // 160
    assert texts > 0
    assert clips > 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_sample_is_one_error_that_names_it_whatever_the_number_of_workers(
    workers: int, uneven_corpus: Corpus, tmp_path: Path
) -> None:
    shutil.copytree(uneven_corpus.path, tmp_path / "corpus")
    corpus = Corpus.open(tmp_path / "corpus")
    split = corpus.split("train")
    entry = split.index[12]
    with split.shards[int(entry["shard"])].open("r+b") as tar:
        tar.seek(int(entry["offset"]) + int(entry["size"]) // 2)
        tar.write(b"\0" * 2000)
    tokenizer = train_tokenizer(uneven_corpus.split("train"), 300)
    reader = UtteranceReader(split, DataSettings(), tokenizer, True, 0.0, 1.0)
    order = [(np.array([id]), np.array([True])) for id in (3, 12, 5)]
    batches = stream(reader, order, workers)
    assert next(batches).ids.tolist() == [3]
    with pytest.raises(UserError) as caught:
        next(batches)
    message = str(caught.value)
    assert split.key(12) in message
    assert split.shards[int(entry["shard"])].name in message
    assert "\n" not in message


DIES_EARLY = """
import os, threading, time
import torch.utils.data._utils.worker as torch_worker
from jointfuse.data.stream import stream

class Late(torch_worker.ManagerWatchdog):
    def __init__(self):
        time.sleep(1)  # the parent is gone when it is looked for
        super().__init__()

class Reader:
    def batch(self, planned):
        return planned

torch_worker.ManagerWatchdog = Late
forked = os.fork
def fork():
    worker = forked()
    if worker:
        print(worker, flush=True)
    return worker
os.fork = fork
batches = stream(Reader(), range(100), 2)
threading.Timer(0.5, os._exit, [0]).start()
next(batches)
"""


@pytest.mark.required
def test_decoding_workers_end_with_a_rank_that_dies_before_they_look_for_it(tmp_path: Path) -> None:
    with (tmp_path / "workers").open("w") as output:
        subprocess.run([sys.executable, "-c", DIES_EARLY], stdout=output, check=True)
    workers = [Path("/proc") / number for number in (tmp_path / "workers").read_text().split()]
    assert len(workers) == 2
    until("they end too", lambda: not any(worker.exists() for worker in workers))


def test_a_model_of_one_modality_gets_nothing_of_the_other(uneven_corpus: Corpus) -> None:
    everything = (np.arange(5), np.ones(5, dtype=bool))
    text = reader_of(uneven_corpus, "text").batch(everything)
    audio = reader_of(uneven_corpus, "audio").batch(everything)
    assert (text.frames == 0).all()
    assert text.token_mask[:, 0].all()
    assert not audio.token_mask.any()
    assert (audio.frames > 0).all()


def test_the_tokenizer_learns_the_corpus_and_pads_with_its_own_token(uneven_corpus: Corpus, tmp_path: Path) -> None:
    split = uneven_corpus.split("train")
    tokenizer = train_tokenizer(split, 300)
    assert len(tokenizer) <= 300
    assert [tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "<pad>", "</s>", "<unk>")] == [0, 1, 2, 3]
    assert tokenizer.pad_token_id == 1
    unseen = "Zoë’s 東京 trip…"
    ids = tokenizer(unseen)["input_ids"]
    assert (ids[0], ids[-1]) == (0, 2)
    assert 3 not in ids, "bytes leave nothing unknown"
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == unseen.lower()
    padded = tokenizer(["I", unseen], padding=True)
    assert padded["input_ids"][0][-1] == 1
    assert padded["attention_mask"][0][-1] == 0
    assert train_tokenizer(split, 300).get_vocab() == tokenizer.get_vocab()
