"""Several corpora read as one under one set of labels, each in its share of an epoch."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import sqrt
from typing import Any, NamedTuple

import numpy as np

from jointfuse.config import DataSettings, MixSettings
from jointfuse.data.cache import cache_of
from jointfuse.data.index import UNLABELLED
from jointfuse.data.samples import Utterance
from jointfuse.data.shards import Corpus, Split, mel_of_training
from jointfuse.errors import UserError


class Part(NamedTuple):
    """One corpus of a mixture."""

    corpus: Corpus
    label_of: np.ndarray  # (its labels,) uint16: the mixture's number for each, UNLABELLED where they are left out
    weight: float | None  # of its share of an epoch

    def renamed(self, labels: np.ndarray) -> np.ndarray:
        """(n,) -> (n,) uint16: labels of the corpus's index as the mixture has them."""
        without = labels == UNLABELLED
        return np.where(without, np.uint16(UNLABELLED), self.label_of[np.where(without, 0, labels)])


class MixedSplit:
    """What is labelled in the splits of one name of several corpora, one behind the other; the face of a `Split`.

    Unlike a split's own index, this one is held in memory: 38 bytes an utterance.

    Args:
        parts: a split of each corpus and what it is there.
        labels: of the mixture.
    """

    def __init__(self, name: str, parts: Sequence[tuple[Split, Part]], labels: Sequence[str]) -> None:
        self.name, self.splits = name, [split for split, _ in parts]
        self.folder = " + ".join(str(split.folder) for split in self.splits)
        self.check_index()
        self._parts = [part for _, part in parts]
        self._kept = [np.flatnonzero(part.renamed(split.index["label"]) != UNLABELLED) for split, part in parts]
        self._starts = np.cumsum([0, *map(len, self._kept)])
        self.index = np.concatenate(list(self._rows(parts)))
        self.shard_sizes: list[int] = np.bincount(
            self.index["shard"], minlength=sum(len(split.shards) for split in self.splits)
        ).tolist()
        own = [self.index["label"][start:end] for start, end in zip(self._starts[:-1], self._starts[1:], strict=True)]
        self.label_counts = np.stack([np.bincount(found, minlength=len(labels)) for found in own])  # (parts, C)
        no_text, no_clip = self.index["characters"] == 0, self.index["duration_ms"] == 0
        self.info: dict[str, Any] = {
            "samples": len(self.index),
            "lacking": {
                "text": int(no_text.sum()),
                "clip": int(no_clip.sum()),
                "both": int((no_text & no_clip).sum()),
            },
            "label_counts": dict(zip(labels, self.label_counts.sum(axis=0).tolist(), strict=True)),
        }
        weights = [part.weight for _, part in parts]
        self.weights = None if None in weights else np.array(weights, dtype=np.float64)  # (parts,)

    def _rows(self, parts: Sequence[tuple[Split, Part]]) -> Iterable[np.ndarray]:
        shard = speaker = dialogue = 0
        for kept, (split, part) in zip(self._kept, parts, strict=True):
            rows = split.index[kept]
            rows["label"] = part.renamed(rows["label"])
            for column, first in (("shard", shard), ("speaker", speaker), ("dialogue", dialogue)):
                rows[column] += first
            shard, speaker = shard + len(split.shards), speaker + len(part.corpus.speakers)
            dialogue += int(split.index["dialogue"][-1]) + 1 if len(split) else 0
            yield rows

    def __len__(self) -> int:
        return len(self.index)

    def check_index(self) -> None:
        """As `Split.check_index`, of every corpus's split."""
        for split in self.splits:
            split.check_index()

    def part_of(self, ids: np.ndarray) -> np.ndarray:
        """(n,) -> (n,): the number of the corpus that each utterance is of."""
        return np.searchsorted(self._starts, ids, side="right") - 1

    def _own(self, i: int) -> tuple[int, int]:
        """The corpus that utterance `i` is of, and its number there."""
        part = int(self.part_of(np.array(i)))
        return part, int(self._kept[part][i - self._starts[part]])

    def sample(self, i: int, audio: bool = True) -> Utterance:
        part, own = self._own(i)
        utterance = self.splits[part].sample(own, audio)
        return replace(utterance, label=int(self._parts[part].label_of[utterance.label]))

    def text(self, i: int) -> str:
        part, own = self._own(i)
        return self.splits[part].text(own)

    def turns_before(self, i: int, number: int) -> list[Utterance]:
        """As `Split.turns_before`: those that are left out or have no label are heard as well."""
        part, own = self._own(i)
        return self.splits[part].turns_before(own, number)

    def characters_before(self, ids: np.ndarray, number: int) -> np.ndarray:
        characters = np.zeros(ids.shape, dtype=np.int64)
        part_of = self.part_of(ids)
        for part, (split, kept) in enumerate(zip(self.splits, self._kept, strict=True)):
            here = part_of == part
            characters[here] = split.characters_before(kept[ids[here] - self._starts[part]], number)
        return characters

    def audio_bytes(self, i: int) -> bytes | None:
        part, own = self._own(i)
        return self.splits[part].audio_bytes(own)

    def key(self, i: int) -> str:
        part, own = self._own(i)
        return self.splits[part].key(own)

    def read_ahead(self, ids: Sequence[int]) -> None:
        places = [self._own(i) for i in ids]
        for number, split in enumerate(self.splits):
            split.read_ahead([own for part, own in places if part == number])


class Mixture:
    """Corpora that are trained on together; the face of a `Corpus`.

    Args:
        corpora: with the weight of each, or None for all of them: every utterance once an epoch.
        renamed: other names for labels of any of the corpora; None leaves their utterances out.
        labels: of a trained model, in order; those of the corpora, as they come, unless given.

    Raises:
        UserError: a label that the model does not know.
    """

    def __init__(
        self,
        corpora: Sequence[tuple[Corpus, float | None]],
        renamed: Mapping[str, str | None],
        labels: Sequence[str] | None = None,
    ) -> None:
        own = [[renamed.get(label, label) for label in corpus.labels] for corpus, _ in corpora]
        self.labels = list(labels or dict.fromkeys(label for names in own for label in names if label is not None))
        self.parts = []
        for (corpus, weight), names in zip(corpora, own, strict=True):
            unknown = [label for label in names if label is not None and label not in self.labels]
            if unknown:
                raise UserError(
                    f"{corpus.path}: its labels are {', '.join(corpus.labels)}; the model was trained on "
                    f"{', '.join(self.labels)}; data.labels={{{unknown[0]}: {self.labels[0]}}} gives a label another "
                    f"name, {{{unknown[0]}: null}} leaves its utterances out"
                )
            numbers = [UNLABELLED if label is None else self.labels.index(label) for label in names]
            self.parts.append(Part(corpus, np.array(numbers, dtype=np.uint16), weight))
        self.path = " + ".join(str(corpus.path) for corpus, _ in corpora)
        self.name = " + ".join(corpus.name for corpus, _ in corpora)
        self.splits = list(dict.fromkeys(split for corpus, _ in corpora for split in corpus.splits))
        self.mel = _pooled([corpus for corpus, _ in corpora])
        self._opened: dict[str, MixedSplit] = {}
        self.info: dict[str, Any] = {
            "name": self.name,
            "labels": self.labels,
            "corpora": [corpus.info for corpus, _ in corpora],
            "weights": [weight for _, weight in corpora],
            "description": " ".join(corpus.info.get("description", "") for corpus, _ in corpora),
            "synthetic": any(corpus.info.get("synthetic") for corpus, _ in corpora),
        }

    def split(self, name: str) -> MixedSplit:
        """The split called `name` of the corpora that have one.

        Raises:
            UserError: none has one, or `data.labels` leaves nothing of it.
        """
        if name not in self._opened:
            parts = [(part.corpus.split(name), part) for part in self.parts if name in part.corpus.splits]
            if not parts:
                raise UserError(f"{self.path}: no split {name!r}; there are {', '.join(self.splits)}")
            split = MixedSplit(name, parts, self.labels)
            if not len(split):
                raise UserError(f"{split.folder}: data.labels leaves out every utterance that has a label")
            self._opened[name] = split
        return self._opened[name]

    @property
    def mel_mean(self) -> float:
        return mel_of_training(self)[0]

    @property
    def mel_deviation(self) -> float:
        return mel_of_training(self)[1]


def _pooled(corpora: Sequence[Corpus]) -> tuple[float, float] | None:
    """Mel mean and deviation over the training clips of all corpora, by their seconds."""
    held = [(_labelled_seconds(c), c) for c in corpora if c.mel is not None and "train" in c.splits]
    if len(held) < 2:
        return held[0][1].mel if held else None
    seconds = sum(own for own, _ in held)
    if not seconds:
        return 0.0, 1.0
    mean = sum(own * c.mel_mean for own, c in held) / seconds
    square = sum(own * (c.mel_deviation**2 + c.mel_mean**2) for own, c in held) / seconds
    return mean, sqrt(max(square - mean**2, 0.0)) or 1.0


def _labelled_seconds(corpus: Corpus) -> float:
    """Of the training clips that the mel statistics are of."""
    record = corpus.info["splits"]["train"]
    if not record.get("unlabelled"):
        return float(record["seconds"])
    index = corpus.split("train").index
    return float(index["duration_ms"][index["label"] != UNLABELLED].sum()) / 1000


AnySplit = Split | MixedSplit
AnyCorpus = Corpus | Mixture


def corpus_digest(corpus: AnyCorpus) -> str:
    """SHA-256 of all that corpus.json says, or those of a mixture and their weights: what is read, in which order, is a
    function of it, wherever a corpus lies."""
    return hashlib.sha256(json.dumps(corpus.info, sort_keys=True).encode()).hexdigest()


def open_data(settings: DataSettings, labels: Sequence[str] | None = None) -> AnyCorpus:
    """What `data.corpus` or `data.mix` names, its labels named as `data.labels` says, without what has no label.

    Args:
        labels: of a trained model: the corpora are read under them, and need not have all of them.

    Raises:
        UserError: nothing is named or what is named is no corpus, or a label that is unknown.
    """
    if not settings.corpus and not settings.mix:
        raise UserError("data.corpus is not set: add data.corpus=FOLDER (tools/build_shards.py makes one)")
    named: Sequence[MixSettings | DataSettings] = settings.mix or [settings]
    corpora = []
    for one in named:
        folder = "" if settings.mix and not one.remote else settings.cache
        cache = cache_of(one.remote, folder, settings.cache_gib, settings.patience)
        corpora.append(Corpus.open(one.corpus, cache=cache, patience=settings.patience))
    if labels is None:
        known = dict.fromkeys(label for corpus in corpora for label in corpus.labels)
        unknown = [label for label in settings.labels if label not in known]
        if unknown:
            raise UserError(f"data.labels: no corpus has a label {unknown[0]!r}; there are {', '.join(known)}")
    alone = corpora[0]
    if not settings.mix and not settings.labels and labels in (None, alone.labels) and not alone.unlabelled:
        return alone
    weights = [one.weight for one in settings.mix] or [None]
    return Mixture(list(zip(corpora, weights, strict=True)), settings.labels, labels)


def open_for_training(settings: DataSettings) -> AnyCorpus:
    """What a recipe trains on.

    Raises:
        UserError: none is named, what is named is none, or it has no training split or one class.
    """
    corpus = open_data(settings)
    if "train" not in corpus.splits:
        raise UserError(
            f"{corpus.path}: no split 'train', only {', '.join(corpus.splits)}; train on another corpus "
            "and score the model on this one with `jointfuse eval RUN --corpus`"
        )
    if len(corpus.labels) < 2:
        raise UserError(f"{corpus.path}: its label set is {corpus.labels}; training needs two classes or more")
    return corpus
