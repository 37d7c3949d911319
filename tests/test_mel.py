"""The mel statistics of a corpus, and the definition behind them, against float64 and torchaudio."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torchaudio
from hypothesis import given
from hypothesis import strategies as st

from jointfuse.data.clips import load_clip
from jointfuse.data.features import continued, log_mel
from jointfuse.data.mel import MelSums, filters, to_pcm, window
from jointfuse.data.shards import Corpus


def log_mel_in_float64(clip: np.ndarray) -> np.ndarray:
    """(S,) int16 -> (F, 80), by the definition, a frame every 80 ms: a DFT, triangles, the logarithm."""
    extended = np.concatenate([clip / 32768, np.zeros(max(0, 512 - len(clip)))])
    hann = np.pad(0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400), 56)
    first = (len(extended) - 512) % 1280 // 2
    frames = [extended[start : start + 512] * hann for start in range(first, len(extended) - 511, 1280)]
    triangles = torchaudio.functional.melscale_fbanks(257, 20.0, 8000.0, 80, 16_000).double().numpy()
    return np.log(np.maximum(np.abs(np.fft.rfft(frames)) ** 2 @ triangles, 1e-6))


def statistics(values: list[np.ndarray]) -> tuple[float, float]:
    every = np.concatenate([one.ravel() for one in values])
    return every.mean(), every.std()


def test_window_and_triangles_are_those_of_torch_and_torchaudio() -> None:
    hann = np.pad(torch.hann_window(400).numpy(), 56)
    np.testing.assert_allclose(window(), hann, atol=1e-6)
    triangles = torchaudio.functional.melscale_fbanks(257, 20.0, 8000.0, 80, 16_000).numpy()
    np.testing.assert_allclose(filters(), triangles, atol=1e-5)


@given(st.integers(1, 4000), st.integers(0, 9))
def test_the_sums_are_those_of_every_eighth_frame_of_a_clip_of_any_length(samples: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    clip = to_pcm((0.1 * random.standard_normal(samples)).astype(np.float32))
    sums = MelSums()
    sums.add(clip)
    mel = log_mel_in_float64(clip)
    assert sums.count == mel.size
    assert sums.sum == pytest.approx(mel.sum(), rel=1e-5)
    assert sums.squares == pytest.approx(np.square(mel).sum(), rel=1e-5)


@pytest.mark.required
def test_the_statistics_of_a_corpus_are_those_of_its_training_clips_as_read_back(uneven_corpus: Corpus) -> None:
    values = {}
    for name in uneven_corpus.splits:
        split = uneven_corpus.split(name)
        clips = [split.sample(id).waveform for id in range(len(split))]
        values[name] = [log_mel_in_float64(clip) for clip in clips if clip is not None]
    mine = uneven_corpus.mel_mean, uneven_corpus.mel_deviation
    assert mine == pytest.approx(statistics(values["train"]), rel=1e-5)
    every = [mel for split in values.values() for mel in split]
    assert abs(statistics(every)[0] - mine[0]) > 1e-3, "dev and test would change them"


@pytest.mark.required
def test_of_real_speech_an_eighth_of_the_frames_has_the_mean_and_deviation_of_all(shared: Path) -> None:
    sums, values = MelSums(), []
    for path in sorted((shared / "data" / "ravdess").glob("*.flac"))[::20]:
        clip = to_pcm(load_clip(path))
        sums.add(clip)
        values.append(log_mel(torch.from_numpy(continued(clip))[None]).double().numpy())
    mean, deviation = statistics(values)
    assert abs(sums.sum / sums.count - mean) < 0.01 * deviation
    assert np.sqrt(sums.squares / sums.count - (sums.sum / sums.count) ** 2) == pytest.approx(deviation, rel=0.01)
