"""Sound out of media files: any container and codec FFmpeg knows, as mono at 16 kHz."""

import math
from functools import lru_cache
from pathlib import Path

import numpy as np

from jointfuse.data.mel import SAMPLE_RATE


class MediaError(ValueError):
    """A file that gives no sound. The message says why, without the file's path."""


class Undecodable(MediaError):
    """FFmpeg cannot read the file or its sound."""


class NoAudioTrack(MediaError):
    """A media file, but one that is silent by construction."""


class EmptyAudio(MediaError):
    """There is an audio track, without a single sample."""


def read_audio(path: Path) -> np.ndarray:
    """The first audio track of a media file as (S,) float32, 16 kHz mono, peak at most 1.

    One packet that does not decode condemns the whole file: with it left out, the rest would move in time.

    Raises:
        Undecodable, NoAudioTrack, EmptyAudio: all of them MediaError.
        OSError: the file is not there or may not be read.
    """
    import av  # a tenth of a second, and corpora of text alone never need it

    if path.stat().st_size == 0:
        raise EmptyAudio("an empty file")
    rates = set()
    joined = av.AudioFifo()  # an array a frame takes longer to join than to decode
    try:
        # With the protocol named, no name of a file is taken for an address.
        with av.open(f"file:{path}", metadata_errors="ignore") as container:
            if not container.streams.audio:
                raise NoAudioTrack("no audio track")
            planes = av.AudioResampler(format="fltp")
            for frame in container.decode(container.streams.audio[0]):
                rates.add(frame.sample_rate)
                for part in planes.resample(frame):
                    part.pts = None  # some files' times leave gaps, which the fifo would refuse
                    joined.write(part)
    except av.FFmpegError as error:
        raise Undecodable(error.strerror or type(error).__name__) from error
    except MediaError:
        raise
    except ValueError as error:  # the resampler, of a frame unlike the first
        raise Undecodable("its rate or channels change within the track") from error
    heard = joined.read()
    if heard is None:
        raise EmptyAudio("no samples")
    samples = heard.to_ndarray()  # (channels, S)
    if not np.isfinite(samples).all():
        raise Undecodable("values that are not numbers")
    return mono(samples.T, rates.pop())


def mono(samples: np.ndarray, rate: int) -> np.ndarray:
    """(S, channels) float32 at `rate` Hz -> (S,) float32 at 16 kHz: the mean of the channels, peak at most 1."""
    waveform = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)
    waveform = resampled(waveform, rate)
    peak = np.abs(waveform).max()
    return waveform / peak if peak > 1 else waveform


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
