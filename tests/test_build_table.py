import errno
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from corpus_helpers import (
    REPOSITORY,
    build_here,
    dialogue_rows,
    hashes,
    run_tool,
    small_corpus,
    split_options,
    write_clip,
    write_table,
)
from scipy.signal import resample_poly

from jointfuse.data.build import build, dialogue_keys, locked
from jointfuse.data.clips import load_clip, read_clips
from jointfuse.data.corpora.table import table_corpus
from jointfuse.data.rows import CorpusSpec
from jointfuse.data.shards import Corpus
from jointfuse.data.sound import to_sound
from jointfuse.data.verify import verify
from jointfuse.errors import UserError

PAIRED = REPOSITORY.parent / "shared" / "data" / "paired"
STOPS = int(os.environ.get("SOAK_SHARDS", "3"))  # tools/soak.sh shards
BUILD = [sys.executable, str(REPOSITORY / "tools" / "build_shards.py"), "table"]


@pytest.fixture
def tables() -> Path:
    return small_corpus()


@pytest.fixture
def built() -> Path:
    return small_corpus() / "built"


@pytest.fixture
def copy(tables: Path, tmp_path: Path) -> Path:
    """The tables and clips, to be spoilt."""
    return Path(shutil.copytree(tables, tmp_path / "tables", ignore=shutil.ignore_patterns("built")))


def edit(table: Path, row: int, **cells: object) -> None:
    """Change cells of data row `row`, counted from 0."""
    import csv

    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    rows[row].update({name: str(value) for name, value in cells.items()})
    write_table(table, rows)


def refused(out: Path, *arguments: object, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line a failing build ends with; nothing may be left of it."""
    status, _, err = run_tool("build_shards", "table", "--out", out, *arguments, capsys=capsys)
    lines = [line for line in err.splitlines() if not line.startswith("building ")]
    assert status == 2, err
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert not (out / "corpus.json").exists()
    assert not list(out.rglob("*.part"))
    return lines[0]


# ---------------------------------------------------------------------------------------------- the same bytes, always


@pytest.mark.required
def test_stopped_at_random_moments_a_build_goes_on_and_ends_with_the_bytes_of_an_undisturbed_one(
    tmp_path: Path,
) -> None:
    rows = dialogue_rows("train", 10 + 8 * STOPS, 4)
    table = write_table(tmp_path / "train.csv", rows)
    for number, row in enumerate(rows):
        write_clip(tmp_path / row["audio"], 1 + number % 5 / 2, pitch=100 + number)
    build_here(table_corpus([("train", table)], "small"), tmp_path / "whole")
    out = tmp_path / "out"
    command = [*BUILD, "--train", str(table), "--out", str(out), "--workers", "2", "--samples-per-shard", "4"]
    command += ["--name", "small"]
    draw = random.Random(0)
    done = stops = 0
    for _ in range(10 * STOPS):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        target = done + draw.randint(1, 4)
        while len(list(out.glob("train/*.json"))) < target and process.poll() is None:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.05))  # a shard takes some 20 ms
        process.send_signal((signal.SIGKILL, signal.SIGINT)[stops % 2])
        if process.wait() == 0:  # this process slept too long: it had ended
            shutil.rmtree(out)
            done = 0
            continue
        done = len(list(out.glob("train/*.json")))
        with pytest.raises(UserError, match="its building never ended"):
            Corpus.open(out)
        stops += 1
        if stops == STOPS:
            break
    assert stops == STOPS
    first = out / "train" / "shard-000000.tar"
    stamp = first.stat().st_mtime_ns
    (out / "train" / ".shard-009999.tar.part").write_bytes(b"left by a killed one")
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "shards are there already" in ended.stderr
    assert first.stat().st_mtime_ns == stamp
    assert hashes(out) == hashes(tmp_path / "whole")


def test_shards_of_other_rows_are_built_again(tables: Path, built: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(built, out)
    (out / "corpus.json").unlink()
    edited = tmp_path / "tables"
    shutil.copytree(tables, edited, ignore=shutil.ignore_patterns("built"))
    edit(edited / "dev.csv", 0, text="another line")
    spec = table_corpus([(split, edited / f"{split}.csv") for split in ("train", "dev", "test")], "small")
    build(spec, out, workers=1, samples_per_shard=4)
    before, after = hashes(built), hashes(out)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"corpus.json", "dev/index.bin", "dev/shard-000000.tar", "dev/shard-000000.json"}
    assert Corpus.open(out).split("dev").sample(0).text == "another line"


def test_a_finished_corpus_is_never_overwritten(
    tables: Path, built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = hashes(built)
    status, _, err = run_tool("build_shards", "table", "--out", built, *split_options(tables), capsys=capsys)
    assert status == 2
    assert "holds a finished corpus already; choose another --out or delete it first" in err
    assert hashes(built) == before
    (tmp_path / "photo.jpg").write_bytes(b"")
    assert "holds 'photo.jpg', which is no part" in refused(tmp_path, *split_options(tables), capsys=capsys)


# ------------------------------------------------------------------------------------------------------- what is taken


def test_one_table_with_a_split_column_aliases_and_any_kind_of_sound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = [
        ("a.wav", 8000, 1),
        ("b.wav", 44_100, 2),
        ("c.flac", 24_414, 1),
        ("d.ogg", 48_000, 2),
        ("e.wav", 16_000, 6),
    ]
    for name, rate, channels in kinds:
        write_clip(tmp_path / "clips" / name, 0.5, rate, channels)
    records = [
        {
            "Utterance": f"Grüße {number}\u0085x",
            "Emotion": ("joy", "anger")[number % 2],
            "Speaker": "Zoë",
            "Dialogue_ID": number // 2,
            "Utterance_ID": number % 2,
            "Split": "validation" if number == 4 else "train",
            "File": f"clips/{name}",
            "StartTime": "00:01:02,500",
        }
        for number, (name, _, _) in enumerate(kinds)
    ]
    table = tmp_path / "all.jsonl"
    table.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records), encoding="utf-8")
    out = tmp_path / "out"
    options = ("--out", out, "--labels", "joy,anger", "--workers", 1, "--licence", "CC0")
    status, _, err = run_tool("build_shards", "table", table, *options, capsys=capsys)
    assert status == 0, err
    corpus = Corpus.open(out)
    assert corpus.name == "out"
    assert corpus.labels == ["joy", "anger"]
    assert corpus.splits == ["train", "dev"]
    assert corpus.info["licence"] == "CC0"
    assert corpus.info["faults"] == []
    split = corpus.split("train")
    for i in range(4):
        utterance = split.sample(i)
        assert utterance.text == f"Grüße {i}\u0085x"
        assert utterance.meta["start"] == 62.5
        assert utterance.meta["end"] is None
        assert utterance.waveform is not None
        assert len(utterance.waveform) == pytest.approx(8000, abs=2)
        assert np.abs(utterance.waveform[500:-500]).max() / 32768 == pytest.approx(0.5, abs=0.03)
    assert not verify(out, workers=1).faults


def test_blank_cells_are_utterances_of_one_modality_when_that_is_meant(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(copy / "train.csv", 0, audio="")
    edit(copy / "train.csv", 1, text="")
    out = copy / "out"
    message = refused(out, *split_options(copy), capsys=capsys)
    assert "train.csv row 2: the audio cell is blank; fill it, or give --allow-missing" in message
    options = (*split_options(copy), "--allow-missing", "--workers", 1)
    assert run_tool("build_shards", "table", "--out", out, *options, capsys=capsys)[0] == 0
    split = Corpus.open(out).split("train")
    assert split.sample(0).waveform is None
    assert split.audio_bytes(0) is None
    assert split.index["duration_ms"][0] == 0
    assert split.sample(1).text == ""
    assert split.index["characters"][1] == 0
    edit(copy / "train.csv", 1, audio="")
    assert "row 3: neither text nor audio" in refused(copy / "other", *options, capsys=capsys)


def test_without_dialogue_columns_every_row_is_its_own_dialogue(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    table = write_table(tmp_path / "train.tsv", rows, delimiter="\t")
    spec = table_corpus([("train", table)], "rows", allow_missing=True)
    assert [[row.text for row in dialogue] for dialogue in spec.splits["train"]] == [["a"], ["b"]]
    assert len({dialogue[0].dialogue for dialogue in spec.splits["train"]}) == 2


def test_dialogue_numbers_may_start_again_in_every_table(copy: Path) -> None:
    edit(copy / "dev.csv", 0, dialogue_id="train0")
    paths = [(split, copy / f"{split}.csv") for split in ("train", "dev")]
    spec = table_corpus(paths, "mine", dialogues_per_table=True)
    names = {split: {dialogue[0].dialogue for dialogue in content} for split, content in spec.splits.items()}
    assert "train_train0" in names["train"]
    assert "dev_train0" in names["dev"]


def test_odd_dialogue_names_become_unique_keys_without_dots_and_slashes() -> None:
    names = ["a.b", "a/b", "../a b", "x" * 300, "x" * 301, "train_a", "a", "日本"]
    keys = dialogue_keys("train", names)
    assert len(set(keys.values())) == len(names)
    assert all(re.fullmatch(r"train_[A-Za-z0-9_-]{1,60}", key) for key in keys.values())


@pytest.mark.parametrize("rate", [8000, 22_050, 24_414, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_clip_of_any_rate_is_resampled_as_scipy_does_it(rate: int, channels: int) -> None:
    samples = 0.1 * np.random.default_rng(0).standard_normal((rate // 2, channels)).astype(np.float32)
    common = math.gcd(rate, 16_000)
    expected = resample_poly(samples.mean(axis=1), 16_000 // common, rate // common)
    for _ in range(2):
        np.testing.assert_array_equal(to_sound(samples, rate).waveform, expected)


def test_a_loud_resampled_clip_never_passes_full_scale(tmp_path: Path) -> None:
    square = np.sign(np.sin(2 * np.pi * 500 * np.arange(11_025) / 11_025)).astype(np.float32) * 3
    soundfile.write(tmp_path / "loud.wav", square, 11_025, subtype="FLOAT")
    assert np.abs(load_clip(tmp_path / "loud.wav")).max() <= 1


def test_resampling_from_an_odd_rate_keeps_the_tone(tmp_path: Path) -> None:
    write_clip(tmp_path / "odd.wav", 5, 24_414, pitch=1000)
    waveform = load_clip(tmp_path / "odd.wav")
    assert np.argmax(np.abs(np.fft.rfft(waveform[:16_000]))) == 1000


@pytest.mark.required
def test_real_paired_dialogues_build_and_verify(tmp_path: Path) -> None:
    if not PAIRED.is_dir():
        pytest.skip("no ../shared/data/paired beside the repository")
    tables = []
    for split, lines in (("train", 60), ("dev", 14)):
        table = tmp_path / f"{split}.csv"
        text = (PAIRED / f"{split}.csv").read_text(encoding="utf-8").splitlines()[:lines]
        table.write_text("\n".join(text).replace("../ravdess", str(PAIRED.parent / "ravdess")), encoding="utf-8")
        tables.append((split, table))
    labels = ["neutral", "joy", "surprise", "anger", "sadness", "disgust", "fear"]
    info = build(table_corpus(tables, "paired", labels=labels), tmp_path / "out", workers=1)
    assert info["splits"]["train"]["samples"] == 59
    assert -14 < info["mel"]["mean"] < 0
    assert not verify(tmp_path / "out", workers=1).faults
    utterance = Corpus.open(tmp_path / "out").split("train").sample(0)
    assert utterance.text == "Hey!"
    assert utterance.waveform is not None
    assert len(utterance.waveform) > 32_000


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("table", "row", "cells", "says"),
    [
        ("dev", 1, {"audio": "wav/gone.wav"}, "dev.csv row 3: clip {folder}/wav/gone.wav is missing"),
        ("train", 4, {"emotion": "angr"}, "train.csv row 6: unknown label 'angr'; did you mean 'anger'?"),
        ("test", 0, {"emotion": "zzz"}, "test.csv row 2: unknown label 'zzz'; known: anger, fear, joy"),
        ("train", 1, {"turn": "two"}, "train.csv row 3: turn 'two' is not a whole number"),
        ("train", 1, {"turn": "0"}, "train.csv row 3: turn 0 of dialogue 'train0' was given before"),
        ("train", 0, {"dialogue_id": " "}, "train.csv row 2: the dialogue cell is blank"),
        ("test", 1, {"dialogue_id": "train2"}, "test.csv row 3: dialogue 'train2' is in test and in train"),
    ],
)
def test_a_faulty_row_is_named_before_anything_is_written(
    copy: Path, capsys: pytest.CaptureFixture[str], table: str, row: int, cells: dict[str, str], says: str
) -> None:
    edit(copy / f"{table}.csv", row, **cells)
    labels = ("--labels", "anger,fear,joy")
    message = refused(copy / "out", *split_options(copy), *labels, capsys=capsys)
    assert says.format(folder=copy) in message
    assert not (copy / "out").exists()


def test_a_clip_of_no_bytes_is_named_before_anything_is_written(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "wav" / "train_0_0.wav").write_bytes(b"")
    message = refused(copy / "out", *split_options(copy), capsys=capsys)
    assert "train.csv row 2: clip" in message
    assert "is an empty file" in message
    assert not (copy / "out").exists()


def test_an_unusable_clip_ends_the_build_by_name(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy / "wav" / "train_0_1.wav"
    soundfile.write(path, np.array([0.1, np.nan, 0.2], np.float32), 16_000, subtype="FLOAT")
    message = refused(copy / "out", "--train", copy / "train.csv", "--workers", 1, capsys=capsys)
    assert f"train.csv row 3: clip {path} holds values that are not numbers" in message
    assert not (copy / "out").exists()


@pytest.mark.parametrize(
    ("content", "says"), [(b"this is no sound at all", "is unreadable"), (None, "is empty: 0 samples")]
)
def test_unreadable_and_empty_clips_are_told_apart(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "clip.wav"
    if content is None:
        soundfile.write(path, np.empty(0, np.float32), 16_000)
    else:
        path.write_bytes(content)
    spec = _one_clip_corpus(path)
    with pytest.raises(UserError, match=f"train.csv row 2: clip .*clip.wav {says}"):
        list(read_clips(spec.splits["train"][0]))


def _one_clip_corpus(path: Path) -> CorpusSpec:
    table = write_table(path.parent / "train.csv", [{"text": "a", "label": "x", "audio": path.name}])
    return table_corpus([("train", table)], "one", labels=["x", "y"])


def test_tables_that_make_no_corpus_are_refused(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, train = copy / "out", copy / "train.csv"
    assert "nowhere.csv: no such table" in refused(out, "--train", copy / "nowhere.csv", capsys=capsys)
    assert "give either tables with a split column, or --train" in refused(out, capsys=capsys)
    assert "no column for the split" in refused(out, train, capsys=capsys)
    message = refused(out, "--train", train, "--label-column", "mood", capsys=capsys)
    assert "no column for the label (sought 'mood'; found dialogue_id, turn, speaker, text, emotion, audio)" in message
    assert "set --label-column" in message
    renamed = copy / "renamed.csv"
    renamed.write_text(train.read_text().replace("audio", "sound", 1))
    assert "no column for the audio" in refused(out, "--train", renamed, capsys=capsys)
    one = copy / "one.csv"
    one.write_text(train.read_text().replace(",anger,", ",joy,").replace(",fear,", ",joy,"))
    assert "only one class, 'joy'" in refused(out, "--train", one, capsys=capsys)
    ragged = copy / "ragged.csv"
    ragged.write_text(train.read_text() + "train9,0\n")
    assert "ragged.csv row 22: 2 cells under 6 column names" in refused(out, "--train", ragged, capsys=capsys)
    empty = copy / "empty.csv"
    empty.write_text("text,label,audio\n")
    assert "empty.csv: the table has no rows" in refused(out, "--train", empty, capsys=capsys)
    latin = copy / "latin.csv"
    latin.write_bytes(train.read_bytes().replace(b"line", b"l\xefne"))
    assert "not UTF-8 text; save the table as UTF-8" in refused(out, "--train", latin, capsys=capsys)
    broken = copy / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"text":')
    assert "broken.jsonl row 2: not JSON" in refused(out, "--train", broken, capsys=capsys)
    assert not out.exists()


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_a_file_that_cannot_grow_ends_the_build_in_one_line_and_leaves_no_half_files(
    tables: Path, tmp_path: Path
) -> None:
    command = [*BUILD, *split_options(tables), "--out", str(tmp_path / "out"), "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit_file_size)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "make room and run the same command again" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.part"))
    assert not (tmp_path / "out" / "corpus.json").exists()


def test_no_space_left_is_said_as_such(tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("jointfuse.data.build._run", full)
    with pytest.raises(UserError, match="No space left on device; make room and run the same command again"):
        build(table_corpus([("train", tables / "train.csv")], "mine"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_builds_keep_out_of_each_other_s_folder(tables: Path, tmp_path: Path) -> None:
    spec = table_corpus([("train", tables / "train.csv")], "mine")
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"), pytest.raises(UserError, match="another build is writing here"):
        build(spec, tmp_path / "out", workers=1)
