"""The front end against torchaudio's own transform."""

import numpy as np
import pytest
import torch
import torchaudio
from hypothesis import given
from hypothesis import strategies as st

from jointfuse.data.features import FrontEnd, continued, log_mel
from jointfuse.data.mel import MEL_BINS, frames_of, to_pcm


def clip(samples: int, seed: int = 0) -> torch.Tensor:
    """A tone in noise with a silent stretch, so that values meet the floor and leave it."""
    rng = np.random.default_rng(seed)
    wave = 0.4 * np.sin(np.arange(samples) / 16_000 * 2 * np.pi * 440) + 0.1 * rng.standard_normal(samples)
    wave[samples // 3 : samples // 2] = 0
    return torch.from_numpy(wave.astype(np.float32))


def mel_of(waveform: torch.Tensor) -> torch.Tensor:
    """(S,) -> (F, 80)"""
    return log_mel(torch.from_numpy(continued(waveform.numpy()))[None])[0, : frames_of(len(waveform))]


@pytest.mark.parametrize("samples", [257, 258, 400, 1599, 1600, 1601, 16_000, 63_999])
def test_log_mel_is_the_logarithm_of_torchaudios_mel_spectrogram(samples: int) -> None:
    reference = torchaudio.transforms.MelSpectrogram(
        16_000, n_fft=512, win_length=400, hop_length=160, f_min=20.0, f_max=8000.0, n_mels=80, power=2.0
    )
    wave = clip(samples)
    expected = reference(wave).T.clamp_min(1e-6).log()
    assert (expected == np.log(np.float32(1e-6))).any() or samples < 2000, "the floor must be met"
    torch.testing.assert_close(mel_of(wave), expected, rtol=0, atol=1e-4)  # its filters are made in float32


@given(st.integers(1, 2000))
def test_a_clip_of_s_samples_has_one_frame_and_one_more_every_ten_milliseconds(samples: int) -> None:
    mel = mel_of(clip(samples))
    assert mel.shape == (1 + samples // 160, MEL_BINS)
    assert mel.dtype == torch.float32
    assert mel.isfinite().all()


@given(st.integers(1, 256))
def test_a_clip_too_short_to_be_reflected_is_extended_with_silence(samples: int) -> None:
    wave = clip(samples)
    extended = torch.cat([wave, torch.zeros(257 - samples)])
    torch.testing.assert_close(mel_of(wave), mel_of(extended)[: 1 + samples // 160])


def test_no_mel_bin_is_empty() -> None:
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal(16_000).astype(np.float32))
    assert (mel_of(noise) > np.log(1e-5)).all()


SAMPLES = (4000, 1, 16_000, 256, 257, 9_613)


def batch_of(waveforms: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """clips (B, S + 512) int16 and frames (B,)."""
    clips = [torch.from_numpy(continued(to_pcm(wave.numpy()))) for wave in waveforms]
    padded = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
    return padded, torch.tensor([frames_of(len(wave)) for wave in waveforms])


def test_a_clip_has_the_spectrogram_it_has_alone_up_to_both_its_ends_whatever_batch_it_is_in() -> None:
    waves = [(clip(samples, seed) * 32768).round() / 32768 for seed, samples in enumerate(SAMPLES)]
    clips, frames = batch_of(waves)
    assert clips.dtype == torch.int16
    unmasked = torch.zeros(len(waves), 0, 2, dtype=torch.long)
    mel = FrontEnd(-3.0, 2.5)(clips, frames, unmasked, unmasked)
    for row, wave in enumerate(waves):
        torch.testing.assert_close(mel[row, : frames[row]], (mel_of(wave) + 3) / 2.5, rtol=0, atol=1e-4)
        assert (mel[row, frames[row] :] == 0).all()
    # The reason for continuing each clip at its own ends: padded with silence, the last frames are others.
    silence = mel_of(torch.cat([waves[0], torch.zeros(4000)]))[: frames[0]]
    assert (mel_of(waves[0])[-1] - silence[-1]).abs().max() > 0.1
    torch.testing.assert_close(mel_of(waves[0])[:23], silence[:23])


def test_masked_bins_and_frames_are_zero_and_no_others() -> None:
    clips, frames = batch_of([clip(16_000, 1), clip(8_000, 2)])
    bins = torch.tensor([[[0, 3], [70, 10]], [[5, 0], [80, 0]]])
    stretches = torch.tensor([[[10, 20]], [[49, 2]]])
    mel = FrontEnd(0.0, 1.0)(clips, frames, bins, stretches)
    hidden = torch.zeros(2, 101, 80, dtype=torch.bool)
    hidden[0, :, :3] = hidden[0, :, 70:] = hidden[0, 10:30] = True
    hidden[1, 49:] = True
    assert torch.equal(mel == 0, hidden)


@given(st.integers(1, 3000))
def test_what_a_sixteen_bit_clip_held_crosses_unchanged_and_louder_samples_are_clipped(samples: int) -> None:
    stored = np.random.default_rng(samples).integers(-32768, 32768, samples).astype(np.int16)
    assert np.array_equal(to_pcm(stored.astype(np.float32) / 32768), stored)
    assert to_pcm(np.array([1, -1, 1.7, -1.7, 0.5 / 32768], np.float32)).tolist() == [32767, -32768, 32767, -32768, 0]
