import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from corpus_helpers import run_tool, small_corpus

from jointfuse.data.index import INDEX_DTYPE
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
