"""Rows with start and end: parts of a recording, or a record of where a clip was cut out."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from corpus_helpers import build_here, run_tool, write_table
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import resample_poly

from jointfuse.data import clips
from jointfuse.data.clips import OVERLAP, Part, load_clip, read_clips
from jointfuse.data.corpora.table import table_corpus
from jointfuse.data.mel import to_pcm
from jointfuse.data.rows import CorpusSpec, ObservedClip, Row
from jointfuse.data.shards import Corpus
from jointfuse.data.sound import CLIPPED, Sound
from jointfuse.data.soundfiles import hear
from jointfuse.data.verify import verify
from jointfuse.errors import UserError

pytestmark = pytest.mark.required
SECONDS = 21


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two recordings of 21 s, a.wav at 44.1 kHz in two channels and b.flac at 16 kHz, and clip.wav of 2 s."""
    folder = tmp_path_factory.mktemp("recordings")
    noise = np.random.default_rng(0).uniform(-0.6, 0.6, (SECONDS * 44_100, 2)).astype(np.float32)
    soundfile.write(folder / "a.wav", noise, 44_100)
    soundfile.write(folder / "b.flac", noise[: SECONDS * 16_000, 0], 16_000)
    soundfile.write(folder / "clip.wav", noise[:32_000, 1], 16_000)
    return folder


def corpus_of(
    folder: Path, rows: Sequence[tuple[str, object, object]], times: str = "auto", dialogues: bool = False
) -> CorpusSpec:
    """One row a (file, start, end), all of one dialogue, or each of its own."""
    places = list(dict.fromkeys(rows))  # of one place there is one label
    table = [
        {
            "dialogue": n if dialogues else "d",
            "text": f"text {n}",
            "label": "xy"[places.index((audio, start, end)) % 2],
            "audio": audio,
            "start": start,
            "end": end,
        }
        for n, (audio, start, end) in enumerate(rows)
    ]
    return table_corpus([("train", write_table(folder / "train.csv", table))], "recordings", times=times)


def rows_of(spec: CorpusSpec) -> list[Row]:
    return [row for dialogue in spec.splits["train"] for row in dialogue]


def waveforms(spec: CorpusSpec) -> list[np.ndarray]:
    heard = list(read_clips(rows_of(spec)))
    return [one.waveform if isinstance(one, ObservedClip) else one for one in heard]  # type: ignore[misc]


def test_rows_on_one_recording_become_its_parts_and_a_corpus_of_them_verifies(folder: Path, tmp_path: Path) -> None:
    times = [(0, 3.5), (3.5, 7.25), (7.25, 9), (9, 12.0625), (12.1, 20), (20, SECONDS)]
    build_here(corpus_of(folder, [("a.wav", start, end) for start, end in times]), tmp_path / "out")
    split = Corpus.open(tmp_path / "out").split("train")
    whole = to_pcm(load_clip(folder / "a.wav"))
    for i, (start, end) in enumerate(times):
        utterance = split.sample(i)
        assert np.array_equal(utterance.waveform, whole[int(start * 16_000) : int(end * 16_000)])
        assert (utterance.meta["start"], utterance.meta["end"]) == (start, end)
    report = verify(tmp_path / "out", workers=1)
    assert not report.faults
    assert not report.observations.counts


span = st.tuples(st.integers(0, SECONDS * 16_000 - 1), st.integers(1, SECONDS * 16_000)).map(sorted)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["a.wav", "b.flac"]), span), min_size=2, max_size=8))
def test_a_part_is_a_slice_of_the_whole_decoded_recording(folder: Path, spans: list[tuple[str, list[int]]]) -> None:
    spans = [(name, ends) for name, ends in spans if ends[1] > ends[0]]
    # Without another row, one that is nearly all of its file would be all of it.
    spans += [(name, [0, n]) for name in ("a.wav", "b.flac") for n in (8_000, 16_000)]
    spec = corpus_of(folder, [(name, first / 16_000, last / 16_000) for name, (first, last) in spans])
    for (name, (first, last)), waveform in zip(spans, waveforms(spec), strict=True):
        assert np.array_equal(waveform, plainly_decoded(folder / name)[first:last])


@cache
def plainly_decoded(path: Path) -> np.ndarray:
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return samples[:, 0] if rate == 16_000 else resample_poly(samples.mean(axis=1), 160, 441)


def test_a_recording_is_decoded_once_for_all_rows_of_a_shard_in_whatever_order_they_come(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []

    def counted(path: Path) -> Sound:
        heard.append(path.name)
        return hear(path)

    monkeypatch.setattr(clips, "hear", counted)
    rows = [
        (name, start, start + 1.5)
        for start in range(0, 18, 2)
        for name in ("a.wav", "b.flac", f"../{folder.name}/a.wav")
    ]
    parts = waveforms(corpus_of(folder, [*rows, ("clip.wav", "", "")]))
    assert heard == ["a.wav", "b.flac", "clip.wav"]
    assert {len(part) for part in parts} == {24_000, 32_000}
    # A part holds its own samples, so that the recording need not stay in memory.
    assert all(part.base is None for part in parts[:-1])


def test_a_clip_as_long_as_its_row_is_taken_whole_and_its_times_are_a_record(folder: Path) -> None:
    for start, end in ((976.0, 978.0), (976.0, 978.45), (976.0, 977.55), (0.3, 2.1)):
        (waveform,) = waveforms(corpus_of(folder, [("clip.wav", start, end)]))
        assert len(waveform) == 32_000
    (waveform,) = waveforms(corpus_of(folder, [("clip.wav", 0.25, 1.25)]))
    assert len(waveform) == 16_000
    # The same times twice are two labels of one clip; other times make it a recording.
    assert [len(one) for one in waveforms(corpus_of(folder, [("clip.wav", 6, 8)] * 2))] == [32_000] * 2
    assert [len(one) for one in waveforms(corpus_of(folder, [("clip.wav", 0, 1.8), ("clip.wav", 1.8, 2)]))] == [
        28_800,
        3_200,
    ]


def test_with_recorded_times_every_clip_is_taken_whole(folder: Path, tmp_path: Path) -> None:
    rows = [("clip.wav", 976.0, 999), ("clip.wav", 5, 3), ("a.wav", 1, "")]
    spec = corpus_of(folder, rows, "recorded")
    assert not any(isinstance(row.clip, Part) for row in rows_of(spec))
    build_here(spec, tmp_path / "out")
    samples = [Corpus.open(tmp_path / "out").split("train").sample(i) for i in range(3)]
    assert [(one.meta["start"], one.meta["end"]) for one in samples] == [(976, 999), (5, 3), (1, None)]
    assert [round(len(one.waveform) / 16_000) for one in samples] == [2, 2, SECONDS]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([("a.wav", 0, 2), ("a.wav", 22, 24)], "row 3: {a} lasts 21.00 s, the row is from 22 to 24 s; mend the times"),
        ([("a.wav", 0, 2), ("a.wav", 20, 21.2)], "row 3: {a} lasts 21.00 s, the row is from 20 to 21.2 s; mend"),
        ([("a.wav", 0, 2), ("a.wav", 3, 3)], "row 3: {a} from 3 to 3 s is no part of it; mend the times, or"),
        ([("a.wav", 0, 2), ("a.wav", 5, 3)], "row 3: {a} from 5 to 3 s is no part of it; mend the times, or"),
        ([("a.wav", -1, 2)], "row 2: {a} from -1 to 2 s is no part of it; mend the times, or"),
        ([("a.wav", 976, 978)], "row 2: {a} lasts 21.00 s, the row is from 976 to 978 s; mend them, or, if the clip"),
        ([("a.wav", 0, 40)], "row 2: {a} lasts 21.00 s, the row is from 0 to 40 s; mend them, or, if the clip"),
        ([("a.wav", 0, 2), ("a.wav", 3, "")], "row 3: 2 rows name {a}, and this one has only a start; give both, or"),
        ([("a.wav", "", 2), ("a.wav", "", "")], "row 2: 2 rows name {a}, and this one has only an end; give both, or"),
    ],
)
def test_times_that_cannot_be_are_named_with_row_file_and_way_out(folder: Path, rows: list[Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        waveforms(corpus_of(folder, rows))
    assert says.format(a=folder / "a.wav") in str(caught.value)
    assert ("--times recorded" in str(caught.value)) == (", or" in says)


def test_the_last_row_may_end_a_tenth_of_a_second_after_its_recording(folder: Path) -> None:
    *_, last = waveforms(corpus_of(folder, [("a.wav", 0, 2), ("a.wav", 20, 21.09)]))
    assert len(last) == 16_000


def test_rows_of_one_recording_may_overlap_and_are_counted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [("a.wav", 0, 1), ("b.flac", 0, 9), ("b.flac", 2, 3), ("b.flac", 8.5, 10), ("b.flac", 10, 11)]
    corpus_of(folder, rows)
    options = ("--train", folder / "train.csv", "--out", tmp_path / "out", "--workers", 1)
    status, printed, err = run_tool("build_shards", "table", *options, capsys=capsys)
    assert status == 0, err
    assert f"observed: {OVERLAP}: 3" in printed
    report = verify(tmp_path / "out", workers=1)
    assert report.observations.counts == {OVERLAP: 3}
    assert "sample train_d_003: 8.5 to 10 s of b.flac" in report.observations.lines[OVERLAP][2]
    status, _, err = run_tool("build_shards", "table", *options, "--times", "cut", capsys=capsys)
    assert status == 2
    assert "--times cut: give auto or recorded" in err


def test_a_build_goes_on_with_other_rows_beside_a_clip_that_make_it_a_recording(folder: Path, tmp_path: Path) -> None:
    """Alone, the first row is a clip that was cut already; its shard is built again though it is the same row."""
    for name, end, seconds in (("b.flac", 20, 2), ("clip.wav", 1, 1.8)):
        build_here(corpus_of(folder, [("clip.wav", 0, 1.8), (name, 0, end)], dialogues=True), tmp_path / "out", 1)
        split = Corpus.open(tmp_path / "out").split("train")
        assert len(split.shards) == 2
        assert len(split.sample(0).waveform) == 16_000 * seconds  # type: ignore[arg-type]
        (tmp_path / "out" / "corpus.json").unlink()


def test_clipping_is_observed_of_the_part_that_is_clipped(tmp_path: Path) -> None:
    wave = 0.5 * np.sin(np.arange(80_000) / 9)
    wave[:32_000] = np.clip(8 * wave[:32_000], -1, 1)
    soundfile.write(tmp_path / "a.wav", wave, 16_000)
    spec = corpus_of(tmp_path, [("a.wav", 0, 2), ("a.wav", 2.01, 5)])
    first, second = read_clips(rows_of(spec))
    assert isinstance(first, ObservedClip)
    assert first.observed[0][0] == CLIPPED
    assert isinstance(second, np.ndarray)
