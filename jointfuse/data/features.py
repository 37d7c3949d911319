"""The audio front end: waveforms in, 80-bin log-mel spectrograms out, a batch at a time on the device that trains.

Every clip is continued by reflection at its own ends before any batching, so its spectrogram does not depend on the
clips it later shares a batch with.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from jointfuse.data.mel import FFT_SIZE, HOP_LENGTH, INT16, MARGIN, MEL_BINS, POWER_FLOOR, filters, window


@cache
def window_and_filters(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(window()).to(device), torch.from_numpy(filters()).to(device)


def continued_length(samples: int) -> int:
    """Samples of a clip of so many once it is continued."""
    return max(samples, MARGIN + 1) + 2 * MARGIN


def continued(waveform: np.ndarray, into: np.ndarray | None = None) -> np.ndarray:
    """(S,) -> (S + 512,), reflected at both ends; a clip too short to be reflected is extended with silence first.

    Args:
        into: written to its beginning, zeros behind it.
    """
    samples, length = len(waveform), continued_length(len(waveform))
    row = np.empty(length, dtype=waveform.dtype) if into is None else into
    row[MARGIN : MARGIN + samples] = waveform
    row[MARGIN + samples :] = 0
    row[:MARGIN] = row[MARGIN + 1 : 2 * MARGIN + 1][::-1]
    row[length - MARGIN : length] = row[length - 2 * MARGIN - 1 : length - MARGIN - 1][::-1]
    return row


def log_mel(clips: torch.Tensor) -> torch.Tensor:
    """Log-mel spectrograms: power, 25 ms Hann window, 10 ms hop, natural log floored at 1e-6.

    Args:
        clips: (B, S + 512) `continued`, 16 kHz mono, float32 in [-1, 1] or int16; zeros behind shorter ones.

    Returns:
        (B, 1 + S // 160, 80) float32, of which a clip of s samples owns the first 1 + s // 160 frames.
    """
    hann, triangles = window_and_filters(clips.device)
    waveforms = clips.float() / INT16 if clips.dtype == torch.int16 else clips
    spectrum = torch.stft(waveforms, FFT_SIZE, HOP_LENGTH, FFT_SIZE, hann, center=False, return_complex=True)
    power = spectrum.real.square() + spectrum.imag.square()  # (B, 257, F)
    return (power.transpose(1, 2) @ triangles).clamp_min(POWER_FLOOR).log()


@dataclass(frozen=True)
class FrontEnd:
    """From the clips of a batch to what the model sees of them.

    Args:
        mean, deviation: of the log-mel values of the training set.
    """

    mean: float
    deviation: float

    def __call__(
        self, clips: torch.Tensor, frames: torch.Tensor, bin_masks: torch.Tensor, frame_masks: torch.Tensor
    ) -> torch.Tensor:
        """Normalised log-mel with zeros behind each clip's end and in its masks, which are (first, number) of bins or
        frames.

        Args:
            clips: (B, S + 512) int16, `continued`.
            frames: (B,) int64.
            bin_masks, frame_masks: (B, M, 2) int64.

        Returns:
            (B, 1 + S // 160, 80) float32.
        """
        mel = (log_mel(clips) - self.mean) / self.deviation
        frame = torch.arange(mel.shape[1], device=mel.device)
        silent = (frame >= frames[:, None]) | _inside(frame, frame_masks)
        masked = _inside(torch.arange(MEL_BINS, device=mel.device), bin_masks)
        return mel.masked_fill(silent[:, :, None] | masked[:, None], 0)


def _inside(places: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """places (N,), masks (B, M, 2) -> (B, N) bool."""
    first, number = masks.unsqueeze(-1).unbind(2)  # (B, M, 1)
    return ((places >= first) & (places < first + number)).any(dim=1)
