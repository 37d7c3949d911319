"""Variants of training clips, drawn from (seed, epoch, id): the same on any rank, in any worker, resumed or not."""

import numpy as np
import torch
import torchaudio.functional as F_audio

from jointfuse.config import AugmentSettings
from jointfuse.data.mel import INT16, MEL_BINS, to_pcm

SPEED_STEPS = 50  # speeds are multiples of 1 / 50: the resampling filters stay short
UNUSED = np.random.default_rng(0)  # where nothing is drawn: making another takes longer than reading a clip's bytes


class Augmentation:
    """What happens to the clips of one epoch.

    Args:
        seed, epoch: of the run; with an utterance's id they decide everything that is drawn for it.
    """

    def __init__(self, settings: AugmentSettings, seed: int, epoch: int) -> None:
        self.settings, self.seed, self.epoch = settings, seed, epoch
        self._idle = settings == AugmentSettings()

    def draws(self, id: int) -> np.random.Generator:
        """The random numbers of one utterance."""
        if self._idle:
            return UNUSED
        # The plan's own numbers have the same key and the counters below 2^64.
        return np.random.Generator(np.random.Philox(key=[self.seed, self.epoch], counter=[0, id + 1, 0, 0]))

    def waveform(self, clip: np.ndarray, draws: np.random.Generator) -> np.ndarray:
        """(S,) -> (S',) int16: speed (and with it pitch; Ko et al. 2015), white noise, gain, in this order."""
        settings = self.settings
        if not (settings.speed or settings.noise or settings.gain):
            return clip
        waveform = torch.from_numpy(clip) / INT16
        if settings.speed:
            furthest = round(settings.speed * SPEED_STEPS)
            speed = SPEED_STEPS + int(draws.integers(-furthest, furthest, endpoint=True))
            waveform = F_audio.resample(waveform, speed, SPEED_STEPS)
        if settings.noise:
            ratio = draws.uniform(*settings.noise)  # dB
            noise = torch.from_numpy(draws.standard_normal(len(waveform), dtype=np.float32))
            waveform = waveform + noise * waveform.square().mean().sqrt() * 10 ** (-ratio / 20)
        if settings.gain:
            waveform = waveform * 10 ** (draws.uniform(-settings.gain, settings.gain) / 20)
        return to_pcm(waveform.numpy())

    def masks(self, frames: int, draws: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Bands of bins and of frames that are hidden, each (M, 2) int64, first and number (SpecAugment, Park et al.
        2019). A mask takes a quarter of the bins or frames at most."""
        settings = self.settings
        return (_bands(settings.bin_masks, MEL_BINS, draws), _bands(settings.frame_masks, frames, draws))


def _bands(asked: tuple[int, int], places: int, draws: np.random.Generator) -> np.ndarray:
    masks, widest = asked
    bands = np.zeros((masks, 2), dtype=np.int64)
    for band in bands:
        number = draws.integers(min(widest, places // 4), endpoint=True)
        band[:] = draws.integers(places - number, endpoint=True), number
    return bands
