"""What the samples of a sound file are brought to: mono at 16 kHz, at most 1. What that hides is looked for before."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import soundfile

from jointfuse.data.mel import INT16, SAMPLE_RATE

FULL_SCALE = 32767 / INT16  # the loudest a 16-bit sample can be
CLIPPED_SHARE = 0.001  # of a clip's samples at full scale: with more it is clipped
CLIPPED = f"clipped clip (over {CLIPPED_SHARE:.1%} at full scale)"
CANCELLED = "clip whose channels cancel each other"
LEFT_OVER = 0.1  # of the sum of the channels' powers is left in the power of their sum: with less, they cancel
LOUDEST = 4.0  # up to this peak, samples beyond 1 are those of a loud recording
FEW = 0.001  # of a clip's samples, the loudest, which may be no part of its sound
OUTLYING = 10.0  # times the loudest of the others: a peak beyond is none of the sound


class MediaError(ValueError):
    """A file that gives no sound. The message says why, without the file's path."""


class Undecodable(MediaError):
    """Neither libsndfile nor FFmpeg can read the file or its sound."""


class NoAudioTrack(MediaError):
    """A media file, but one that is silent by construction."""


class EmptyAudio(MediaError):
    """There is an audio track, without a single sample."""


class Damaged(MediaError):
    """The sound can be read, but is not what was recorded."""


@dataclass(frozen=True)
class Sound:
    """A sound file, heard."""

    waveform: np.ndarray  # (S,) float32 at 16 kHz
    rate: int  # Hz of the file, of which `frames` and `loud` are
    frames: int
    loud: np.ndarray  # (N,) the frames in which a channel is at full scale, ascending
    only: int | None = None  # the channel that was taken alone, counted from 1, since all of them cancel each other

    @property
    def seconds(self) -> float:
        return len(self.waveform) / SAMPLE_RATE

    def observed(self, start: float = 0.0, end: float = math.inf) -> Iterator[tuple[str, str]]:
        """(kind, what was found) between two times, in seconds, that the waveform no longer shows."""
        if self.only is not None:
            yield CANCELLED, f"channel {self.only} is taken alone"
        first, last = round(start * self.rate), round(min(end * self.rate, self.frames))
        share = float(np.diff(np.searchsorted(self.loud, (first, last)))[0]) / max(1, last - first)
        if share > CLIPPED_SHARE:
            yield CLIPPED, f"{share:.1%} of its samples at full scale"


def to_sound(samples: np.ndarray, rate: int, full_scale: float = FULL_SCALE, beyond: bool = False) -> Sound:
    """(S, channels) float32 at `rate` Hz as mono at 16 kHz: the mean of the channels, peak at most 1.

    Args:
        full_scale: the loudest that the file's samples can be, or what counts as such.
        beyond: its samples may be louder than 1 without being clipped there, as floats are.

    Raises:
        EmptyAudio: there are none.
        Damaged: they are not numbers, or few of them are so much louder than the others that they are none of it.
    """
    if len(samples) == 0:
        raise EmptyAudio("no samples")
    high, low = float(samples.max()), float(samples.min())
    peak = max(high, -low)
    if not (math.isfinite(high) and math.isfinite(low)):
        raise Damaged("holds values that are not numbers (NaN or infinity)")
    if peak > LOUDEST:
        _check_peak(samples, peak)
    loud = np.zeros(0, np.intp)
    if peak >= full_scale and not (beyond and peak > 1):
        loud = np.flatnonzero((np.abs(samples) >= full_scale).any(axis=1))
    waveform, only = _mixed(samples)
    waveform = resampled(waveform, rate)
    peak = np.abs(waveform).max()
    return Sound(waveform / peak if peak > 1 else waveform, rate, len(samples), loud, only)


def _check_peak(samples: np.ndarray, peak: float) -> None:
    loudness = np.abs(samples).max(axis=1)
    few = max(1, int(FEW * len(loudness)))
    if few < len(loudness):
        rest = float(np.partition(loudness, -few - 1)[-few - 1])
        if peak > OUTLYING * rest:
            raise Damaged(f"has a peak of {peak:g} where nearly all of its samples are below {max(rest, 1e-3):.2g}")


def _mixed(samples: np.ndarray) -> tuple[np.ndarray, int | None]:
    """(S, channels) -> (S,): their mean, or the loudest channel and its number where the mean leaves little of them."""
    channels = samples.shape[1]
    if channels == 1:
        return samples[:, 0], None
    together = samples[:, 0] + samples[:, 1]  # numpy's mean over so short an axis takes ten times as long
    for channel in samples.T[2:]:
        together += channel
    powers = [float(np.dot(channel, channel)) for channel in samples.T]
    if float(np.dot(together, together)) < LEFT_OVER * sum(powers):
        loudest = int(np.argmax(powers))
        return samples[:, loudest], loudest + 1
    together /= np.float32(channels)
    return together, None


def resampled(waveform: np.ndarray, rate: int) -> np.ndarray:
    """(S,) float32 at `rate` Hz -> (S,) float32 at 16 kHz, by scipy's polyphase filter."""
    if rate == SAMPLE_RATE:
        return waveform
    # It takes longer to import than most clips take to read.
    from scipy.signal import resample_poly

    # torchaudio's Resample would build a kernel of hundreds of megabytes for rates such as 24,414 Hz.
    common = math.gcd(rate, SAMPLE_RATE)
    up, down = SAMPLE_RATE // common, rate // common
    result: np.ndarray = resample_poly(waveform, up, down, window=_low_pass(max(up, down)))
    return result


@lru_cache(maxsize=4)
def _low_pass(factor: int) -> np.ndarray:
    """(20 factor + 1,) float32: the filter that resample_poly would design for every clip anew."""
    from scipy.signal import firwin

    return firwin(20 * factor + 1, 1 / factor, window=("kaiser", 5.0)).astype(np.float32)


def reason(error: soundfile.SoundFileError) -> str:
    """What libsndfile says of a file, without the object it was read from."""
    return str(getattr(error, "error_string", error)).strip().removeprefix("Error : ").rstrip(".")
