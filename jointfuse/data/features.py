"""The audio front end: a waveform in, an 80-bin log-mel spectrogram out.

Every clip is padded by reflection at its own ends before any batching, so its spectrogram does not depend on the
clips it later shares a batch with.
"""

from functools import cache

import torch
import torchaudio.functional as F_audio

SAMPLE_RATE = 16_000  # Hz
WINDOW = 400  # samples: 25 ms
HOP_LENGTH = 160  # samples: 10 ms
FFT_SIZE = 512  # the narrowest of 80 mel bins from 20 Hz spans 44 Hz: bins of 31.25 Hz leave none of them empty
MEL_BINS = 80
MEL_LOW, MEL_HIGH = 20.0, 8000.0  # Hz
POWER_FLOOR = 1e-6
FRAMES_PER_SECOND = SAMPLE_RATE // HOP_LENGTH


@cache
def _window_and_filters() -> tuple[torch.Tensor, torch.Tensor]:
    window = torch.hann_window(WINDOW)
    filters = F_audio.melscale_fbanks(FFT_SIZE // 2 + 1, MEL_LOW, MEL_HIGH, MEL_BINS, SAMPLE_RATE)
    return window, filters


def log_mel(waveform: torch.Tensor) -> torch.Tensor:
    """Log-mel spectrogram of one clip: power, 25 ms Hann window, 10 ms hop, natural log floored at 1e-6.

    Args:
        waveform: (S,) float32 in [-1, 1], 16 kHz mono. A clip too short to be reflected is extended with silence.

    Returns:
        (F, 80) float32, F = 1 + S // 160 frames.
    """
    window, filters = _window_and_filters()
    frames = 1 + waveform.numel() // HOP_LENGTH
    shortest = FFT_SIZE // 2 + 1
    if waveform.numel() < shortest:
        waveform = torch.nn.functional.pad(waveform, (0, shortest - waveform.numel()))
    spectrum = torch.stft(
        waveform, FFT_SIZE, HOP_LENGTH, WINDOW, window, center=True, pad_mode="reflect", return_complex=True
    )
    power = (spectrum.real.square() + spectrum.imag.square())[:, :frames]  # (257, F)
    return (power.T @ filters).clamp_min(POWER_FLOOR).log()
