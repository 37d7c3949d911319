"""What a log-mel spectrogram is here, in numbers and numpy, and its mean and deviation over a corpus.

`features.py` computes the spectrograms that a model sees, with torch, on its device.
"""

from functools import cache

import numpy as np

SAMPLE_RATE = 16_000  # Hz
WINDOW = 400  # samples: 25 ms
HOP_LENGTH = 160  # samples: 10 ms
FFT_SIZE = 512  # the narrowest of 80 mel bins from 20 Hz spans 44 Hz: bins of 31.25 Hz leave none of them empty
MEL_BINS = 80
MEL_LOW, MEL_HIGH = 20.0, 8000.0  # Hz
POWER_FLOOR = 1e-6
FRAMES_PER_SECOND = SAMPLE_RATE // HOP_LENGTH
MARGIN = FFT_SIZE // 2  # samples by which a clip is continued at either end
INT16 = 32768.0  # what the samples of a 16-bit clip are fractions of

STATISTICS_STEP = 8  # of so many frames the statistics take one: neighbours say nearly the same


def frames_of(samples: int) -> int:
    """Frames of a clip of so many samples: one, and one more every 10 ms."""
    return 1 + samples // HOP_LENGTH


def to_pcm(waveform: np.ndarray) -> np.ndarray:
    """(S,) float32 in [-1, 1] -> (S,) int16, clipped where it is louder than one."""
    return np.clip(np.rint(waveform * INT16), -INT16, INT16 - 1).astype(np.int16)


@cache
def window() -> np.ndarray:
    """(512,) float32: a periodic Hann window of 25 ms with zeros at either side."""
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    return np.pad(hann, (FFT_SIZE - WINDOW) // 2).astype(np.float32)


@cache
def filters() -> np.ndarray:
    """(257, 80) float32: triangles of height one, equally wide in mel (2595 log10(1 + f / 700), as in HTK)."""
    low, high = 2595 * np.log10(1 + np.array([MEL_LOW, MEL_HIGH]) / 700)
    corners = 700 * (10 ** (np.linspace(low, high, MEL_BINS + 2) / 2595) - 1)  # Hz
    bins = np.linspace(0, SAMPLE_RATE / 2, FFT_SIZE // 2 + 1)[:, None]  # Hz
    rise = (bins - corners[:-2]) / (corners[1:-1] - corners[:-2])
    fall = (corners[2:] - bins) / (corners[2:] - corners[1:-1])
    return np.maximum(0, np.minimum(rise, fall)).astype(np.float32)


class MelSums:
    """Running sums over the log-mel of every clip, a frame every 80 ms, for the corpus's mean and deviation."""

    def __init__(self) -> None:
        self.count, self.sum, self.squares = 0, 0.0, 0.0

    def add(self, clip: np.ndarray) -> None:
        """(S,) int16 at 16 kHz."""
        mel = _some_frames(clip)
        self.count += mel.size
        self.sum += float(mel.sum(dtype=np.float64))
        self.squares += float(np.square(mel, dtype=np.float64).sum())


def _some_frames(clip: np.ndarray) -> np.ndarray:
    """(S,) int16 -> (F, 80): log-mel of 32 ms every 80 ms, as far from the beginning as from the end.

    Either is often silent. A clip shorter than 32 ms is extended with silence.
    """
    whole = clip if len(clip) >= FFT_SIZE else np.pad(clip, (0, FFT_SIZE - len(clip)))
    step = STATISTICS_STEP * HOP_LENGTH
    first = (len(whole) - FFT_SIZE) % step // 2
    frames = np.lib.stride_tricks.sliding_window_view(whole, FFT_SIZE)[first::step]  # (F, 512)
    spectrum = np.fft.rfft(frames * _window_of_int16())  # (F, 257)
    power = np.square(spectrum.real) + np.square(spectrum.imag)
    return np.log(np.maximum(power @ filters(), np.float32(POWER_FLOOR)))


@cache
def _window_of_int16() -> np.ndarray:
    return window() / np.float32(INT16)
