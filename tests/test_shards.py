import io
import json
import pickle
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import webdataset
from corpus_helpers import REPOSITORY, hashes, small_corpus
from hypothesis import given
from hypothesis import strategies as st

from jointfuse.data.clips import load_clip
from jointfuse.data.samples import Utterance, _files, _plain_files, write_tar
from jointfuse.data.shards import INDEX_DTYPE, Corpus
from jointfuse.errors import UserError


@pytest.fixture
def built() -> Path:
    return small_corpus() / "built"


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "corpus"))


def test_samples_come_back_as_they_were_in_the_table(built: Path) -> None:
    corpus = Corpus.open(built)
    assert corpus.labels == ["anger", "fear", "joy"]
    assert corpus.splits == ["train", "dev", "test"]
    split = corpus.split("train")
    assert len(split) == len(split.index) == 20
    utterance = split.sample(6)
    assert (utterance.dialogue, utterance.turn, utterance.speaker) == ("train1", 2, "Ann")
    assert utterance.text == "line 2 of 1"
    assert corpus.labels[utterance.label] == utterance.meta["emotion"] == "joy"
    assert utterance.key == split.key(6) == "train_train1_002"
    original = load_clip(built.parent / "wav" / "train_1_2.wav")
    assert utterance.waveform is not None
    assert utterance.waveform.dtype == np.int16
    np.testing.assert_allclose(utterance.waveform / 32768, original, atol=1 / 32768)


def test_the_index_says_what_the_samples_say(built: Path) -> None:
    corpus = Corpus.open(built)
    for name in corpus.splits:
        split = corpus.split(name)
        assert split.index.dtype == INDEX_DTYPE
        for i, entry in enumerate(split.index):
            utterance = split.sample(i)
            assert utterance.waveform is not None
            assert entry["duration_ms"] == round(len(utterance.waveform) / 16)
            assert entry["characters"] == len(utterance.text)
            assert entry["label"] == utterance.label
            assert corpus.speakers[entry["speaker"]] == utterance.speaker
            assert entry["turn"] == utterance.turn
            assert f"{name}{entry['dialogue']}" == utterance.dialogue


def test_dialogues_are_contiguous_and_never_straddle_shards(built: Path) -> None:
    split = Corpus.open(built).split("train")
    assert len(split.shards) == 5
    for dialogue in range(5):
        rows = np.flatnonzero(split.index["dialogue"] == dialogue)
        assert np.array_equal(rows, np.arange(rows[0], rows[0] + 4))
        assert len(set(split.index["shard"][rows])) == 1
        assert split.index["turn"][rows].tolist() == [0, 1, 2, 3]


def test_plain_webdataset_reads_a_shard(built: Path) -> None:
    corpus = Corpus.open(built)
    split = corpus.split("dev")
    urls = [str(shard) for shard in split.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert len(samples) == len(split)
    for i, sample in enumerate(samples):
        mine = split.sample(i)
        assert sample["__key__"] == mine.key
        assert sample["txt"] == mine.text
        assert sample["json"] == mine.meta
        waveform, rate = soundfile.read(io.BytesIO(sample["flac"]), dtype="int16")
        assert rate == 16_000
        np.testing.assert_array_equal(waveform, mine.waveform)


def test_a_pickled_split_is_small_and_reads_on(built: Path) -> None:
    split = Corpus.open(built).split("train")
    split.sample(0)
    data = pickle.dumps(split)
    assert len(data) < 4000
    np.testing.assert_array_equal(pickle.loads(data).sample(7).waveform, split.sample(7).waveform)


def test_the_readers_do_not_import_torch() -> None:
    code = "import sys, jointfuse.data.shards; sys.exit('torch' in sys.modules or 'webdataset' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


def test_audio_bytes_are_the_stored_flac_and_audio_can_be_left_undecoded(built: Path) -> None:
    split = Corpus.open(built).split("test")
    data = split.audio_bytes(0)
    assert data is not None
    assert data[:4] == b"fLaC"
    assert split.sample(0, audio=False).waveform is None


def test_an_unknown_split_is_refused_with_the_ones_there_are(built: Path) -> None:
    with pytest.raises(UserError, match="no split 'valid'; there are train, dev, test"):
        Corpus.open(built).split("valid")


def test_folders_that_are_no_finished_corpus_are_refused_with_a_way_out(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder; a corpus is made by"):
        Corpus.open(tmp_path / "nowhere")
    file = copy / "corpus.json"
    info = json.loads(file.read_text())
    file.write_text("{")
    with pytest.raises(UserError, match=r"corpus\.json: Invalid JSON.*; copy the corpus again or build it again"):
        Corpus.open(copy)
    file.write_text(json.dumps(info | {"format": 0}))
    with pytest.raises(UserError, match="format 0, this version reads format 2"):
        Corpus.open(copy)
    file.unlink()
    with pytest.raises(UserError, match=r"no corpus\.json, so this is no corpus or its building never ended"):
        Corpus.open(copy)


def test_shard_names_cannot_lead_out_of_the_corpus(copy: Path) -> None:
    info = json.loads((copy / "corpus.json").read_text())
    info["splits"]["dev"]["shards"][0]["name"] = "../train/shard-000000.tar"
    (copy / "corpus.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="outside its folder"):
        Corpus.open(copy)


def test_a_truncated_tar_is_refused_when_the_corpus_is_opened(copy: Path) -> None:
    tar = copy / "train" / "shard-000001.tar"
    tar.write_bytes(tar.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"train/shard-000001\.tar: 5000 bytes, corpus\.json says \d+: truncated"):
        Corpus.open(copy)
    tar.unlink()
    with pytest.raises(UserError, match=r"shard-000001\.tar: No such file"):
        Corpus.open(copy)


@pytest.mark.parametrize("damage", ["flac", "header", "cut"])
def test_a_damaged_sample_is_named_by_shard_key_and_offset(copy: Path, damage: str) -> None:
    split = Corpus.open(copy).split("dev")
    tar, offset = split.shards[0], int(split.index[2]["offset"])
    data = bytearray(tar.read_bytes())
    if damage == "flac":
        data[offset + 512 : offset + 600] = bytes(88)
    elif damage == "header":
        data[offset : offset + 512] = b"x" * 512
    else:
        del data[offset + 700 :]
    tar.write_bytes(data)
    with pytest.raises(UserError) as caught:
        split.sample(2)
    message = str(caught.value)
    assert f"dev/shard-000000.tar: sample dev_dev0_002 at byte {offset} cannot be read" in message
    assert "tools/verify_shards.py" in message
    assert split.sample(0).text == "line 0 of 0"


def test_an_index_of_the_wrong_length_is_refused(copy: Path) -> None:
    file = copy / "dev" / "index.bin"
    file.write_bytes(file.read_bytes()[: INDEX_DTYPE.itemsize * 2])
    with pytest.raises(UserError, match=r"index\.bin: 2 entries, corpus\.json says 6"):
        Corpus.open(copy).split("dev").sample(0)


def _utterance(**changes: Any) -> Utterance:
    meta = {"label": 0, "emotion": "joy", "speaker": "a", "dialogue": "d", "turn": 0}
    fields = {"key": "k", "text": "", "waveform": None, "label": 0, "speaker": "a", "dialogue": "d", "turn": 0}
    return Utterance(**(fields | {"meta": meta} | changes))


def test_a_tar_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    def utterances() -> Any:
        yield _utterance()
        raise UserError("stop")

    with pytest.raises(UserError, match="stop"):
        write_tar(tmp_path / "shard-000000.tar", utterances())
    assert hashes(tmp_path) == {}


def test_a_clip_of_one_sample_is_still_a_clip(tmp_path: Path) -> None:
    from jointfuse.data.index import index_rows

    sidecar = write_tar(tmp_path / "a.tar", [_utterance(waveform=np.full(1, 32767, np.int16))])
    assert index_rows([sidecar], ["a"])[0]["duration_ms"] == 1
    sample = next(iter(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)))
    assert soundfile.read(io.BytesIO(sample["flac"]), dtype="int16")[0].tolist() == [32767]


def tar_of(files: list[tuple[str, bytes]], format: int) -> bytes:
    """As a sample lies in a shard: members, and no end."""
    stream = io.BytesIO()
    tar = tarfile.open(fileobj=stream, mode="w", format=format)  # noqa: SIM115
    for name, content in files:
        header = tarfile.TarInfo(name)
        header.size = len(content)
        tar.addfile(header, io.BytesIO(content))
    return stream.getvalue()


names = st.text(st.characters(codec="utf-8", exclude_characters="/\0."), min_size=1, max_size=150)
contents = st.lists(st.tuples(names, st.binary(max_size=1500)), min_size=1, max_size=4)


@given(contents, st.sampled_from([tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
def test_plain_members_are_read_as_tarfile_reads_them_and_others_left_to_it(
    files: list[tuple[str, bytes]], format: int
) -> None:
    try:
        data = tar_of(files, format)
    except ValueError:
        return  # a name that this format cannot hold
    found = _plain_files(data)
    assert list(_files(data)) == files
    assert found in (files, None)
    assert found or any(len(name) > 99 or not name.isascii() for name, _ in files) or format != tarfile.USTAR_FORMAT
    assert _plain_files(data[: 511 + len(files[0][1])]) is None
    assert _plain_files(data[:130] + b"\1" + data[131:]) is None
