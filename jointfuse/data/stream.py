"""From a plan and a corpus to batches: utterances read by offset, decoded in worker processes, in the plan's order."""

from collections.abc import Iterable, Iterator
from copy import copy
from typing import Any, Self

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from jointfuse.config import AugmentSettings, DataSettings
from jointfuse.data.augment import Augmentation
from jointfuse.data.batch import Example, HostBatch, collate
from jointfuse.data.features import (
    FRAMES_PER_SECOND,
    MEL_BINS,
    SAMPLE_RATE,
    FrontEnd,
    continued,
    frames_of,
    to_int16,
)
from jointfuse.data.shards import Split
from jointfuse.errors import UserError

Planned = tuple[np.ndarray, np.ndarray]  # ids (b,), valid (b,)
Masks = tuple[np.ndarray, np.ndarray]  # of bins and of frames, each (M, 2) int64, first and number


class UtteranceReader:
    """One split's utterances as model input.

    Args:
        split: of a corpus.
        tokenizer: None where the model reads no text.
        audio: whether the model reads clips.
        mel_mean, mel_deviation: of the training set the model was, or will be, trained on.

    Raises:
        UserError: an utterance that cannot be read, or lacks what `missing_modality: error` demands.
    """

    def __init__(
        self,
        split: Split,
        settings: DataSettings,
        tokenizer: PreTrainedTokenizerBase | None,
        audio: bool,
        mel_mean: float,
        mel_deviation: float,
    ) -> None:
        self.split, self.settings, self.tokenizer, self.audio = split, settings, tokenizer, audio
        self.front_end = FrontEnd(mel_mean, mel_deviation)
        self.max_samples = round(settings.max_seconds * SAMPLE_RATE)
        self.augmentation = Augmentation(AugmentSettings(), seed=0, epoch=0)
        self._require_modalities()

    def positions(self, patch: tuple[int, int]) -> np.ndarray:
        """(S,): how many positions each utterance takes in the model: patches of (bins, frames) where clips are read,
        else characters, which an index counts and tokens follow."""
        index = self.split.index
        if not self.audio:
            return np.asarray(index["characters"])
        heard = np.minimum(index["duration_ms"], self.settings.max_seconds * 1000)
        frames = (heard > 0) + (heard * (FRAMES_PER_SECOND / 1000)).astype(np.int64)
        return -(-frames // patch[1]) * (MEL_BINS // patch[0])

    def augmented(self, augmentation: Augmentation) -> Self:
        """The same utterances, their clips varied."""
        reader = copy(self)
        reader.augmentation = augmentation
        return reader

    def _require_modalities(self) -> None:
        index = self.split.index
        no_text, no_clip = index["characters"] == 0, index["duration_ms"] == 0
        for read, lacks, what in ((self.tokenizer, no_text, "text"), (self.audio, no_clip, "clip")):
            if not read or not lacks.any():
                continue
            only = not (self.tokenizer and self.audio)
            if only or self.settings.missing_modality == "error":
                way_out = (
                    "a model of one modality cannot use it: leave it out of the corpus or set model.modality=both"
                    if only
                    else "set data.missing_modality=allow to use the modality it has"
                )
                first = self.split.key(int(lacks.argmax()))
                raise UserError(
                    f"{self.split.folder}: {lacks.sum()} utterances have no {what} (first: {first}); {way_out}"
                )
        if self.tokenizer and self.audio and (no_text & no_clip).any():
            first = self.split.key(int((no_text & no_clip).argmax()))
            raise UserError(f"{self.split.folder}: {first} has neither text nor clip; leave it out of the corpus")

    def __getitem__(self, id: int) -> Example:
        utterance = self.split.sample(id, audio=self.audio)
        tokens, cut_tokens = np.empty(0, dtype=np.int64), False
        if self.tokenizer and utterance.text.strip():
            encoded = self.tokenizer(utterance.text, truncation=True, max_length=self.settings.max_tokens + 1)
            cut_tokens = len(encoded["input_ids"]) > self.settings.max_tokens
            if cut_tokens:
                encoded = self.tokenizer(utterance.text, truncation=True, max_length=self.settings.max_tokens)
            tokens = np.asarray(encoded["input_ids"], dtype=np.int64)
        waveform = None
        if self.audio and utterance.waveform is not None:
            waveform = torch.from_numpy(utterance.waveform)
        cut_audio = waveform is not None and len(waveform) > self.max_samples
        clip, frames, masks = self._clip(id, waveform)
        return Example(id, tokens, clip, frames, *masks, utterance.label, cut_tokens, cut_audio)

    def _clip(self, id: int, waveform: torch.Tensor | None) -> tuple[torch.Tensor, int, Masks]:
        """(S,) float32 -> (S' + 512,) int16, its frames, and its masks."""
        draws = self.augmentation.draws(id)
        clip, frames = torch.empty(0, dtype=torch.int16), 0
        if waveform is not None:
            heard = self.augmentation.waveform(waveform, draws)[: self.max_samples]
            clip, frames = continued(to_int16(heard)), frames_of(len(heard))
        return clip, frames, self.augmentation.masks(frames, draws)

    def batch(self, planned: Planned) -> HostBatch:
        ids, valid = planned
        pad = self.tokenizer.pad_token_id if self.tokenizer else 0
        return collate([self[int(id)] for id in ids], valid, pad)


class _PlannedBatches(Dataset[HostBatch]):
    def __init__(self, reader: UtteranceReader, planned: list[Planned]) -> None:
        self.reader, self.planned = reader, planned

    def __len__(self) -> int:
        return len(self.planned)

    def __getitem__(self, position: int) -> HostBatch | UserError:  # type: ignore[override]
        # An exception raised in a worker arrives wrapped in its stack trace; a value arrives as it is.
        try:
            return self.reader.batch(self.planned[position])
        except UserError as error:
            return error


def stream(reader: UtteranceReader, planned: Iterable[Planned], workers: int, pin: bool = False) -> Iterator[HostBatch]:
    """Batches in exactly the planned order, whatever the number of workers.

    Raises:
        UserError: an utterance could not be read.
    """
    loader: DataLoader[Any] = DataLoader(
        _PlannedBatches(reader, list(planned)),
        batch_size=None,
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch
