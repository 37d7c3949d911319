import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from corpus_helpers import Row, build_here, make_tables, run_tool, small_corpus, tone, write_clip, write_table

from jointfuse.data.corpora.table import table_corpus
from jointfuse.data.index import INDEX_DTYPE
from jointfuse.data.observe import LISTED, Observations, observe_speakers, repeated
from jointfuse.data.verify import verify


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_corpus() / "built", tmp_path / "corpus"))


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_sound_corpus_has_no_faults(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run_tool("verify_shards", copy, "--workers", 2, capsys=capsys)
    assert status == 0
    assert re.search(r"no fault\(s\) in 28 samples, 8 shards, [\d.]+ MB, 3 splits", out)


def test_one_flipped_bit_is_found_and_its_sample_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar = copy / "train" / "shard-000002.tar"
    sample = json.loads(tar.with_suffix(".json").read_text())["samples"][1]
    data = bytearray(tar.read_bytes())
    data[sample["offset"] + 512 + 300] ^= 1
    tar.write_bytes(data)
    status, out, _ = run_tool("verify_shards", copy, "--workers", 1, capsys=capsys)
    assert status == 1
    assert "train/shard-000002.tar: SHA-256" in out
    assert out.count("SHA-256") == 2


def test_a_truncated_tar_is_listed_sample_by_sample(copy: Path) -> None:
    tar = copy / "dev" / "shard-000001.tar"
    tar.write_bytes(tar.read_bytes()[:9000])
    faults = verify(copy, workers=1).faults
    assert any(f"{tar}: 9000 bytes, its sidecar says" in fault for fault in faults)
    assert any("sample dev_dev1_002" in fault and "bytes early" in fault for fault in faults)
    assert all("dev/shard-000001" in fault for fault in faults)


def test_what_does_not_fit_together_is_listed(copy: Path) -> None:
    def swap_turns(sidecar: dict[str, Any]) -> None:
        sidecar["samples"][0]["turn"], sidecar["samples"][1]["turn"] = 1, 0

    def same_dialogue(sidecar: dict[str, Any]) -> None:
        for sample in sidecar["samples"]:
            sample["dialogue"] = "train0"

    def wrong_counts(info: dict[str, Any]) -> None:
        info["splits"]["train"]["label_counts"]["joy"] += 1
        info["splits"]["dev"]["seconds"] += 1
        info["mel"]["mean"] += 0.1
        info["labels"] = ["anger", "fear", "delight"]

    rewrite(copy / "train" / "shard-000001.json", swap_turns)
    rewrite(copy / "test" / "shard-000000.json", same_dialogue)
    rewrite(copy / "corpus.json", wrong_counts)
    index = copy / "dev" / "index.bin"
    data = bytearray(index.read_bytes())
    data[3 * INDEX_DTYPE.itemsize + 1] ^= 1
    index.write_bytes(data)
    (copy / "train" / "shard-000077.tar").write_bytes(b"")
    (copy / "train" / "shard-000003.tar").unlink()
    faults = "\n".join(verify(copy, workers=1).faults)
    for expected in (
        "sample train_train1_000 at byte 0: turn is 0, the sidecar says 1",
        "dialogue 'train1' has turn 0 after turn 1",
        "dialogue 'train0' is in split 'train' too",
        "sample test_test0_000 at byte 0: dialogue is 'test0', the sidecar says 'train0'",
        "mel mean and deviation do not follow",
        "label_counts of train is",
        "seconds of dev is",
        "label 2 ('joy') is not in the corpus's list",
        "dev/index.bin: differs from the sidecars, first at sample 3",
        "shard-000077.tar: a shard that corpus.json does not list",
        "shard-000003.tar: missing",
    ):
        assert expected in faults, faults


def test_a_hidden_sample_behind_the_last_one_is_found(copy: Path) -> None:
    def forget_last(sidecar: dict[str, Any]) -> None:
        sidecar["samples"].pop()

    rewrite(copy / "train" / "shard-000004.json", forget_last)
    faults = "\n".join(verify(copy, workers=1).faults)
    assert "data that the sidecar does not know after byte" in faults
    assert "3 samples, corpus.json says 4" in faults


def test_a_folder_without_a_corpus_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for tool in ("verify_shards", "shard_stats"):
        status, _, err = run_tool(tool, tmp_path / "nowhere", capsys=capsys)
        assert status == 2
        assert err.startswith("error: ")
        assert err.count("\n") == 1


def test_statistics_are_printed_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "stats.png"
    status, out, err = run_tool("shard_stats", small_corpus() / "built", "--png", picture, capsys=capsys)
    assert status == 0, err
    assert re.search(r"utterances\W+20\W+6\W+2\b", out)
    assert re.search(r"dialogues\W+5\W+2\W+1\b", out)
    assert re.search(r"joy\W+7\W+35", out)
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.stat().st_size > 30_000
    status, _, err = run_tool("shard_stats", small_corpus() / "built", "--png", tmp_path / "stats.pdf", capsys=capsys)
    assert status == 2
    assert "give a name ending in .png" in err


# -------------------------------------------------------------------------------------------------------- observations


def remade(tmp_path: Path, change: Callable[[dict[str, list[Row]], Path], None], **options: Any) -> Path:
    """The small corpus, made in this process from rows and clips that `change` has altered."""
    folder = tmp_path / "tables"
    rows = make_tables(folder)
    change(rows, folder)
    for split, content in rows.items():
        write_table(folder / f"{split}.csv", content)
    spec = table_corpus([(split, folder / f"{split}.csv") for split in rows], "small", times="recorded")
    build_here(replace(spec, **options), tmp_path / "corpus")
    return tmp_path / "corpus"


def same_speakers(rows: dict[str, list[Row]], folder: Path) -> None:
    """Ann and Bob are in train alone."""
    for split in ("dev", "test"):
        for row in rows[split]:
            row["speaker"] += f" of {split}"


@pytest.mark.required
def test_silence_clipping_repeated_clips_and_times_are_observed_and_no_faults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(rows: dict[str, list[Row]], folder: Path) -> None:
        train, dev = rows["train"], rows["dev"]
        for number, row in enumerate(dev + rows["test"]):
            write_clip(folder / row["audio"], 0.3, pitch=500 + 10 * number)
        soundfile.write(folder / train[0]["audio"], np.zeros(3200), 16_000)
        soundfile.write(folder / train[1]["audio"], 3e-4 * tone(0.3), 16_000)
        soundfile.write(folder / train[2]["audio"], np.clip(4 * tone(0.3), -1, 1), 16_000)
        shutil.copy(folder / train[5]["audio"], folder / dev[1]["audio"])
        shutil.copy(folder / train[5]["audio"], folder / train[7]["audio"])
        dev[1].update(text=train[5]["text"], emotion=train[5]["emotion"])
        train[7]["emotion"] = "fear" if train[5]["emotion"] == "joy" else "joy"
        for content in rows.values():
            for row in content:
                row |= {"start": row["turn"], "end": row["turn"] + 0.5}
        train[10]["start"], train[10]["end"] = 0.2, -1
        train[11]["start"] = train[11]["end"] = 3
        same_speakers(rows, folder)

    corpus = remade(tmp_path, change)
    status, out, _ = run_tool("verify_shards", corpus, "--workers", 1, capsys=capsys)
    assert status == 0
    for expected in (
        "silent clip (below -60 dB): 2",
        "sample train_train0_000: digital silence",
        "sample train_train0_001: -80 dB",
        "clipped clip (over 0.1% at full scale): 1",
        "sample train_train0_002: 66.8% of its samples at full scale",
        "clip of another split: 1",
        "sample dev_dev0_001: as train train_train1_001, with the same text and the same label",
        "clip that is in its split twice: 1",
        "sample train_train1_003: as train train_train1_001, with another text and another label",
        "time that ends before it starts: 2",
        "sample train_train2_002: from 0.2 to -1 s",
        "turn that starts before the turn before it: 1",
        "sample train_train2_002: at 0.2 s, the turn before at 1 s",
        "sample train_train2_003: from 3 to 3 s",
        "split that lacks a class: 1",
        "corpus/test: no utterance of fear",
        "no fault(s) in 28 samples",
        "; 9 observation(s)",
    ):
        assert expected in out, out
    assert "speakers with train" not in out


def test_speakers_of_train_in_another_split_are_an_observation_unless_the_corpus_excludes_it(tmp_path: Path) -> None:
    def nothing(rows: dict[str, list[Row]], folder: Path) -> None: ...

    report = verify(remade(tmp_path / "shared", nothing), workers=1)
    assert report.observations.counts["split that shares speakers with train"] == 2
    assert not report.faults
    report = verify(remade(tmp_path / "said", nothing, speaker_independent=True), workers=1)
    assert [fault.partition(": ")[2] for fault in report.faults] == [
        "2 of 2 speakers are in train too: Ann, Bob; corpus.json says that the splits share no speaker"
    ] * 2
    assert not verify(remade(tmp_path / "kept", same_speakers, speaker_independent=True), workers=1).faults


def test_rows_without_a_speaker_share_none() -> None:
    assert not list(observe_speakers({"train": ["unknown", "Ann"], "dev": ["unknown", "Bob"]}))


def test_what_is_not_a_number_is_a_fault_wherever_it_stands(copy: Path) -> None:
    def spoil(info: dict[str, Any]) -> None:
        info["faults"] = [{"seconds": float("nan")}]

    def spoil_sums(sidecar: dict[str, Any]) -> None:
        sidecar["mel"]["sum"] = float("inf")

    rewrite(copy / "corpus.json", spoil)
    rewrite(copy / "train" / "shard-000001.json", spoil_sums)
    # Inside a tar, NaN takes the four bytes of null.
    tar = copy / "dev" / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes().replace(b'"start": null', b'"start": NaN ', 1))
    faults = "\n".join(verify(copy, workers=1).faults)
    assert "corpus.json: faults[0].seconds is nan, not a number" in faults
    assert "shard-000001.json: mel.sum: Input should be a finite number" in faults
    assert "sample dev_dev0_000 at byte 0: start is nan, not a number" in faults


def test_a_dialogue_in_pieces_and_a_key_twice_are_found_over_shards(copy: Path) -> None:
    def again(sidecar: dict[str, Any]) -> None:
        for sample in sidecar["samples"]:
            sample["dialogue"] = "train1"
        sidecar["samples"][0]["key"] = "train_train1_000"

    rewrite(copy / "train" / "shard-000003.json", again)
    faults = "\n".join(verify(copy, workers=1).faults)
    assert "train: dialogue 'train1' is in pieces, in shard-000001 and shard-000003" in faults
    assert "train: key 'train_train1_000' is there 2 times" in faults


def test_an_observation_made_often_is_counted_and_its_first_lines_kept() -> None:
    ours, other = Observations(), Observations()
    for number in range(LISTED + 5):
        ours.note("silent", f"a{number}")
        other.note("silent", f"b{number}")
        other.note("clipped", f"b{number}")
    ours.add(other)
    assert ours.counts == {"silent": 2 * LISTED + 10, "clipped": LISTED + 5}
    assert ours.lines["silent"] == [f"a{number}" for number in range(LISTED)]
    assert len(ours.lines["clipped"]) == LISTED


def test_repeated_hashes_are_found_in_order_and_zero_is_none() -> None:
    found = repeated(np.array([7, 0, 5, 7, 0, 5, 9, 7], dtype=np.uint64))
    assert [group.tolist() for group in found] == [[0, 3, 7], [2, 5]]
    assert not list(repeated(np.zeros(0, dtype=np.uint64)))
