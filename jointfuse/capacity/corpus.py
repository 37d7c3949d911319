"""What is known of the utterances before one of them is read."""

from dataclasses import dataclass

import numpy as np

from jointfuse.capacity.rehearsal import Lengths
from jointfuse.config import Config
from jointfuse.data.columns import Positions, Weights
from jointfuse.data.features import FRAMES_PER_SECOND
from jointfuse.data.mixture import AnySplit, MixedSplit
from jointfuse.train.loop import open_corpus

CHARACTERS = 4  # of a token, in English
SAMPLE = 10**6  # utterances of which the mean length is taken


@dataclass(frozen=True)
class Corpus:
    """The training split; without a corpus, classes alone, all of them as frequent."""

    name: str  # empty without one
    classes: int
    counts: list[int]  # utterances of each class; empty where they are drawn by share
    shares: list[float]  # of each class among the utterances drawn
    mean: Lengths | None


def corpus_of(config: Config, classes: int) -> Corpus:
    """Of what the recipe trains on; of so many classes where it names no corpus. Raises UserError."""
    if not config.data.corpus and not config.data.mix:
        return Corpus("", classes, [], [1 / classes] * classes, None)
    corpus = open_corpus(config)
    split = corpus.split("train")
    counts, mean = list(split.info["label_counts"].values()), _mean_lengths(config, split)
    mixed = split.label_counts if isinstance(split, MixedSplit) else np.array([counts])
    if config.data.balance == "none" and (not isinstance(split, MixedSplit) or split.weights is None):
        return Corpus(corpus.name, len(counts), counts, [count / len(split) for count in counts], mean)
    drawn = (Weights(split, config.data.balance).of_label * mixed).sum(axis=0)
    return Corpus(corpus.name, len(counts), [], (drawn / drawn.sum()).tolist(), mean)


def _mean_lengths(config: Config, split: AnySplit) -> Lengths:
    data, every = config.data, slice(0, None, -(-len(split) // SAMPLE))
    seconds = np.minimum(split.index["duration_ms"][every] / 1000, data.max_seconds)
    tokens = np.minimum(2 + Positions(split, data, None)[every] / CHARACTERS, data.max_tokens)
    return Lengths(round(float(tokens.mean())), 1 + round(float(seconds.mean()) * FRAMES_PER_SECOND))
