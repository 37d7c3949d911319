"""Variants of training clips: what they change, and that nothing but seed, epoch and id decides them."""

import numpy as np
import pytest
import torch
from helpers import example_of, reader_of
from hypothesis import given
from hypothesis import strategies as st

from jointfuse.config import AugmentSettings
from jointfuse.data.augment import Augmentation
from jointfuse.data.mel import INT16, to_pcm
from jointfuse.data.reader import UtteranceReader
from jointfuse.data.shards import Corpus
from jointfuse.data.stream import stream

EVERYTHING = AugmentSettings(speed=0.12, noise=(10, 40), gain=6, bin_masks=(2, 12), frame_masks=(2, 30))
ids = st.integers(0, 2**40)


def tone(seconds: float = 1.0, hertz: float = 400.0) -> torch.Tensor:
    return 0.1 * torch.sin(2 * torch.pi * hertz * torch.arange(round(seconds * 16_000)) / 16_000)


def changed(settings: AugmentSettings, waveform: torch.Tensor, id: int) -> torch.Tensor:
    augmentation = Augmentation(settings, seed=5, epoch=2)
    varied = augmentation.waveform(to_pcm(waveform.numpy()), augmentation.draws(id))
    return torch.from_numpy(varied) / INT16


def masked(settings: AugmentSettings, frames: int, id: int) -> torch.Tensor:
    """(F, 80) bool: where a mask lies."""
    augmentation = Augmentation(settings, seed=5, epoch=2)
    hidden = torch.zeros(frames, 80, dtype=torch.bool)
    bins, stretches = augmentation.masks(frames, augmentation.draws(id))
    for first, number in bins:
        hidden[:, first : first + number] = True
    for first, number in stretches:
        hidden[first : first + number] = True
    return hidden


@pytest.fixture(scope="module")
def reader(uneven_corpus: Corpus) -> UtteranceReader:
    return reader_of(uneven_corpus, "both")


def epoch_of(reader: UtteranceReader, seed: int, epoch: int) -> UtteranceReader:
    return reader.for_training(Augmentation(EVERYTHING, seed, epoch))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_clips_variant_depends_on_seed_epoch_and_id_not_on_batch_order_or_worker(
    workers: int, reader: UtteranceReader
) -> None:
    number = len(reader.split.index)
    alone = [example_of(epoch_of(reader, 1, 4), id) for id in range(number)]
    order = np.random.default_rng(0).permutation(number)
    planned = [(part, np.ones(len(part), dtype=bool)) for part in np.array_split(order, 5)]
    for batch in stream(epoch_of(reader, 1, 4), planned, workers):
        for row, id in enumerate(batch.ids.tolist()):
            one = alone[id]
            assert batch.frames[row] == one.frames
            assert np.array_equal(batch.clips[row, 256 : 256 + len(one.clip)], one.clip)
            assert np.array_equal(batch.bin_masks[row], one.bin_masks)
            assert np.array_equal(batch.frame_masks[row], one.frame_masks)


def test_another_epoch_or_seed_or_utterance_has_other_variants(reader: UtteranceReader) -> None:
    plain = example_of(reader, 3)
    variants = [example_of(epoch_of(reader, seed, epoch), 3) for seed, epoch in ((1, 4), (1, 5), (2, 4))]
    for number, one in enumerate([plain, *variants]):
        for other in variants[number:]:
            assert not np.array_equal(one.clip, other.clip)
            assert not np.array_equal(one.frame_masks, other.frame_masks)
    draws = Augmentation(EVERYTHING, 1, 4).draws
    assert len({draws(id).integers(2**62) for id in range(1000)}) == 1000


def test_the_reader_of_an_epoch_leaves_the_plain_one_as_it_was(reader: UtteranceReader) -> None:
    before = example_of(reader, 3)
    example_of(epoch_of(reader, 1, 4), 3)
    assert np.array_equal(example_of(reader, 3).clip, before.clip)
    assert example_of(reader, 3).bin_masks.size == example_of(reader, 3).frame_masks.size == 0


def test_with_nothing_set_nothing_changes(reader: UtteranceReader) -> None:
    unset = reader.for_training(Augmentation(AugmentSettings(), 1, 4))
    for id in range(len(reader.split.index)):
        assert np.array_equal(example_of(unset, id).clip, example_of(reader, id).clip)
        waveform = reader.split.sample(id).waveform
        assert waveform is not None
        assert np.array_equal(example_of(reader, id).clip, waveform)


@given(ids)
def test_speed_moves_duration_and_pitch_together(id: int) -> None:
    faster = changed(AugmentSettings(speed=0.2), tone(), id)
    speed = 16_000 / len(faster)
    assert 0.8 - 1e-4 <= speed <= 1.2 + 1e-4
    spectrum = torch.fft.rfft(faster[1000:-1000] * torch.hann_window(len(faster) - 2000)).abs()
    peak = int(spectrum.argmax()) * 16_000 / (len(faster) - 2000)
    assert peak == pytest.approx(400 * speed, abs=2)


def test_every_speed_in_range_comes_up() -> None:
    lengths = {len(changed(AugmentSettings(speed=0.12), tone(), id)) for id in range(300)}
    assert lengths == {-(-16_000 * 50 // (50 + step)) for step in range(-6, 7)}


@given(ids)
def test_noise_has_the_asked_ratio_to_the_clip(id: int) -> None:
    clean = tone()
    noise = changed(AugmentSettings(noise=(10, 20)), clean, id) - clean
    ratio = 10 * torch.log10(clean.square().mean() / noise.square().mean())
    assert 9.8 < ratio < 20.2
    assert abs(float(noise.mean())) < 4 * float(noise.std()) / len(noise) ** 0.5 + 1e-6


@given(ids)
def test_gain_is_one_factor_within_its_range(id: int) -> None:
    clean = tone()[1:]
    factor = (changed(AugmentSettings(gain=6), clean, id) * clean).sum() / clean.square().sum()
    torch.testing.assert_close(changed(AugmentSettings(gain=6), clean, id), factor * clean, rtol=0, atol=2 / INT16)
    assert -6.001 <= 20 * torch.log10(factor) <= 6.001


def test_silence_stays_silence_and_the_shortest_clip_a_clip() -> None:
    settings = AugmentSettings(speed=0.12, noise=(0, 0), gain=6)
    for samples in (1, 500):
        variant = changed(settings, torch.zeros(samples), 7)
        assert variant.eq(0).all()
        assert abs(len(variant) - samples) <= 0.15 * samples + 1


@given(ids, st.integers(1, 400))
def test_masks_are_whole_bands_no_wider_than_asked_or_a_quarter(id: int, frames: int) -> None:
    bins = masked(AugmentSettings(bin_masks=(1, 12)), frames, id)
    assert (bins == bins[:1]).all()
    assert bins[0].sum() <= 12
    assert bins[0].diff().sum() <= 2, "one band"
    stretch = masked(AugmentSettings(frame_masks=(1, 30)), frames, id)
    assert (stretch == stretch[:, :1]).all()
    assert stretch[:, 0].sum() <= min(30, frames // 4)


def test_masks_reach_every_bin_and_frame_and_their_widest() -> None:
    bins = torch.stack([masked(AugmentSettings(bin_masks=(1, 12)), 100, id)[0] for id in range(2000)])
    stretches = torch.stack([masked(AugmentSettings(frame_masks=(1, 30)), 100, id)[:, 0] for id in range(2000)])
    assert bins.any(dim=0).all()
    assert bins.sum(dim=1).max() == 12
    assert stretches.any(dim=0).all()
    assert stretches.sum(dim=1).max() == 25
