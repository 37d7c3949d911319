"""One split's utterances as a model reads them: tokens, with the turns before them, and clips, varied and cut."""

import os
from collections.abc import Sequence
from copy import copy
from typing import Self

import numpy as np
from transformers import PreTrainedTokenizerBase

from jointfuse.config import AugmentSettings, DataSettings
from jointfuse.data.augment import Augmentation
from jointfuse.data.batch import Example, HostBatch, collate
from jointfuse.data.columns import Positions
from jointfuse.data.features import FrontEnd
from jointfuse.data.mel import SAMPLE_RATE, frames_of
from jointfuse.data.mixture import AnySplit
from jointfuse.data.plan import Planned
from jointfuse.data.samples import Utterance
from jointfuse.data.tokenizer import encode
from jointfuse.errors import UserError

# Decoding processes are copies of one that may have tokenised, and its threads would not be in them.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

NOTHING = Utterance("", "", None, 0, "", "", 0, {})
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
        split: AnySplit,
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
        self.skips = False
        self._require_modalities()

    def positions(self, patch: tuple[int, int]) -> "Positions":
        """How many positions each utterance takes in the model: patches of (bins, frames) where clips are read, else
        characters, which an index counts and tokens follow."""
        return Positions(self.split, self.settings, patch if self.audio else None)

    def for_training(self, augmentation: Augmentation) -> Self:
        """The same utterances, their clips varied; what cannot be read is skipped where `on_error` says so. Scores are
        never of fewer utterances than there are."""
        reader = copy(self)
        reader.augmentation, reader.skips = augmentation, self.settings.on_error == "skip"
        return reader

    def _require_modalities(self) -> None:
        lacking, of_both = self.split.info["lacking"], bool(self.tokenizer) and self.audio
        for what, read in (("text", self.tokenizer), ("clip", self.audio)):
            if not read or not lacking[what] or (of_both and self.settings.missing_modality == "allow"):
                continue
            way_out = (
                "set data.missing_modality=allow to use the modality it has"
                if of_both
                else "a model of one modality cannot use it: leave it out of the corpus or set model.modality=both"
            )
            count, first = lacking[what], self._first(what)
            raise UserError(f"{self.split.folder}: {count} utterances have no {what} (first: {first}); {way_out}")
        if of_both and lacking["both"]:
            first = self._first("text", "clip")
            raise UserError(f"{self.split.folder}: {first} has neither text nor clip; leave it out of the corpus")

    def _first(self, *lacked: str) -> str:
        """Key of the first utterance that lacks all of these."""
        columns = {"text": "characters", "clip": "duration_ms"}
        return self.split.key(int(np.all([self.split.index[columns[what]] == 0 for what in lacked], axis=0).argmax()))

    def batch(self, planned: Planned) -> HostBatch:
        """What is planned, read and padded; a skipped utterance is there as one without text and clip, not valid."""
        ids, valid = planned[0].tolist(), planned[1].copy()
        self.split.read_ahead(ids)
        utterances, before, skipped = [], [], []
        for row, id in enumerate(ids):
            try:
                utterance = self.split.sample(id, audio=self.audio)
                turns = self._turns_before(id, utterance)
            except UserError as error:
                if not self.skips:
                    raise
                if valid[row]:
                    skipped.append(str(error))
                valid[row] = False
                utterance, turns = NOTHING, []
            utterances.append(utterance)
            before.append(turns)
        pad = self.tokenizer.pad_token_id if self.tokenizer else 0
        return collate(self._examples(ids, utterances, before), valid, pad, skipped)

    def examples(self, ids: Sequence[int], utterances: Sequence[Utterance]) -> list[Example]:
        """Utterances that were read, as model input. Raises UserError where a turn before one cannot be read."""
        return self._examples(ids, utterances, list(map(self._turns_before, ids, utterances)))

    def _turns_before(self, id: int, utterance: Utterance) -> list[Utterance]:
        """The turns that an utterance is read with.

        Raises:
            UserError: one of them cannot be read. Without it the utterance would be another input: it is not read.
        """
        if not self.settings.context or not self.tokenizer or not utterance.text.strip():
            return []
        try:
            return self.split.turns_before(id, self.settings.context)
        except UserError as error:
            raise UserError(f"{error} (a turn before sample {utterance.key}, with data.context)") from error

    def _examples(
        self, ids: Sequence[int], utterances: Sequence[Utterance], before: Sequence[list[Utterance]]
    ) -> list[Example]:
        if self.settings.context or self.settings.speakers != "none":
            texts = [self._in_context(*read) for read in zip(before, utterances, strict=True)]
        else:
            texts = self._tokens([utterance.text for utterance in utterances])
        made = []
        for id, utterance, (tokens, cut_tokens) in zip(ids, utterances, texts, strict=True):
            clip, frames, masks, cut_audio = self._clip(id, utterance.waveform)
            made.append(Example(id, tokens, clip, frames, *masks, utterance.label, cut_tokens, cut_audio))
        return made

    def _tokens(self, texts: list[str]) -> list[tuple[np.ndarray, bool]]:
        """(T,) int64 of each text, none for a blank one, and whether it was cut."""
        found = [(np.empty(0, dtype=np.int64), False)] * len(texts)
        spoken = [row for row, text in enumerate(texts) if text.strip()]
        if not self.tokenizer or not spoken:
            return found
        longest = self.settings.max_tokens
        encoded = encode(self.tokenizer, [texts[row] for row in spoken], longest + 1)
        for row, tokens in zip(spoken, encoded, strict=True):
            cut = len(tokens) > longest
            if cut:
                (tokens,) = encode(self.tokenizer, [texts[row]], longest)
            found[row] = np.asarray(tokens, dtype=np.int64), cut
        return found

    def _in_context(self, before: list[Utterance], utterance: Utterance) -> tuple[np.ndarray, bool]:
        """(T,) int64: the turns before an utterance and its own, a separator behind each; and whether its own was cut.
        Turns that do not fit are left out, the oldest first."""
        if not self.tokenizer or not utterance.text.strip():
            return np.empty(0, dtype=np.int64), False
        turns = [turn for turn in (*before, utterance) if turn.text.strip()]
        encoded = encode(self.tokenizer, _spoken(turns, self.settings.speakers))
        begin, end = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        room = self.settings.max_tokens - 1
        own = encoded[-1]
        kept = [*own[: room - 1], end]
        for turn in reversed(encoded[:-1]):
            if len(kept) + len(turn) + 1 > room:
                break
            kept = [*turn, end, *kept]
        return np.asarray([begin, *kept], dtype=np.int64), len(own) > room - 1

    def _clip(self, id: int, waveform: np.ndarray | None) -> tuple[np.ndarray, int, Masks, bool]:
        """(S,) int16 -> (S',) int16, its frames, its masks, and whether it was cut."""
        draws = self.augmentation.draws(id)
        if waveform is None:
            return np.empty(0, dtype=np.int16), 0, self.augmentation.masks(0, draws), False
        heard = self.augmentation.waveform(waveform, draws)[: self.max_samples]
        frames = frames_of(len(heard))
        cut = len(waveform) > self.max_samples
        return heard, frames, self.augmentation.masks(frames, draws), cut


def _spoken(turns: list[Utterance], speakers: str) -> list[str]:
    """The text of each turn, and who speaks as `data.speakers` wants it."""
    if speakers == "none":
        return [turn.text for turn in turns]
    names = list(dict.fromkeys(turn.speaker for turn in turns))
    tags = names if speakers == "names" else [_tag(number) for number in range(len(names))]
    return [f"{tags[names.index(turn.speaker)]}: {turn.text}" for turn in turns]


def _tag(number: int) -> str:
    """A to Z, AA, AB, and so on."""
    return (_tag(number // 26 - 1) if number >= 26 else "") + chr(ord("A") + number % 26)
