"""The front end against torchaudio's own transform."""

import numpy as np
import pytest
import torch
import torchaudio
from hypothesis import given
from hypothesis import strategies as st

from jointfuse.data.features import MEL_BINS, log_mel


def clip(samples: int, seed: int = 0) -> torch.Tensor:
    """A tone in noise with a silent stretch, so that values meet the floor and leave it."""
    rng = np.random.default_rng(seed)
    wave = 0.4 * np.sin(np.arange(samples) / 16_000 * 2 * np.pi * 440) + 0.1 * rng.standard_normal(samples)
    wave[samples // 3 : samples // 2] = 0
    return torch.from_numpy(wave.astype(np.float32))


@pytest.mark.parametrize("samples", [257, 258, 400, 1599, 1600, 1601, 16_000, 63_999])
def test_log_mel_is_the_logarithm_of_torchaudios_mel_spectrogram(samples: int) -> None:
    reference = torchaudio.transforms.MelSpectrogram(
        16_000, n_fft=512, win_length=400, hop_length=160, f_min=20.0, f_max=8000.0, n_mels=80, power=2.0
    )
    wave = clip(samples)
    expected = reference(wave).T.clamp_min(1e-6).log()
    assert (expected == np.log(np.float32(1e-6))).any() or samples < 2000, "the floor must be met"
    torch.testing.assert_close(log_mel(wave), expected, rtol=1e-5, atol=1e-5)


@given(st.integers(1, 2000))
def test_a_clip_of_s_samples_has_one_frame_and_one_more_every_ten_milliseconds(samples: int) -> None:
    mel = log_mel(clip(samples))
    assert mel.shape == (1 + samples // 160, MEL_BINS)
    assert mel.dtype == torch.float32
    assert mel.isfinite().all()


@given(st.integers(1, 256))
def test_a_clip_too_short_to_be_reflected_is_extended_with_silence(samples: int) -> None:
    wave = clip(samples)
    extended = torch.cat([wave, torch.zeros(257 - samples)])
    torch.testing.assert_close(log_mel(wave), log_mel(extended)[: 1 + samples // 160])


def test_no_mel_bin_is_empty() -> None:
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal(16_000).astype(np.float32))
    assert (log_mel(noise) > np.log(1e-5)).all()


def test_a_clip_is_padded_at_its_own_ends_whatever_follows_it() -> None:
    wave = clip(4000)
    longer = torch.cat([wave, torch.zeros(4000)])
    alone, together = log_mel(wave), log_mel(longer)[: 1 + 4000 // 160]
    inside = slice(0, 23)  # frames whose window ends before the clip does
    torch.testing.assert_close(alone[inside], together[inside])
    # The reason for computing each clip alone: the last frames would not be the same.
    assert (alone[-1] - together[-1]).abs().max() > 0.1
