"""What is known of the utterances before one of them is read."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jointfuse.capacity.rehearsal import Lengths
from jointfuse.config import Config
from jointfuse.data.columns import Positions
from jointfuse.data.mel import FRAMES_PER_SECOND
from jointfuse.data.mixture import AnySplit, MixedSplit, open_for_training
from jointfuse.errors import UserError

CHARACTERS = 4  # of a token, in English
SAMPLE = 10**6  # utterances of which the mean length is taken
BALANCE = {"none": 1.0, "sqrt": 0.5, "class": 0.0}  # classes are drawn by this power of their numbers


@dataclass(frozen=True)
class Corpus:
    """The training split."""

    name: str  # empty where the recipe names none
    counts: list[int]  # utterances of each class
    shares: list[float] | None  # of each class among those drawn; None: every utterance comes once
    mean: Lengths | None


def read_counts(text: str) -> list[int]:
    """'12,5,7' -> [12, 5, 7]. Raises UserError."""
    counts = [int(number) if number.strip().isdecimal() else 0 for number in text.split(",")]
    if len(counts) < 2 or min(counts) < 1:
        raise UserError(f"--counts {text}: write the utterances of each class, of two or more, as 120,80,35")
    return counts


def corpus_of(config: Config, counts: Sequence[int]) -> Corpus:
    """Of what the recipe trains on; with these counts where it names no corpus. Raises UserError."""
    name, split, mean = "", None, None
    if config.data.corpus or config.data.mix:
        corpus = open_for_training(config.data)
        name, split = corpus.name, corpus.split("train")
        counts, mean = list(split.info["label_counts"].values()), _mean_lengths(config, split)
    number, once = np.array(counts, dtype=np.float64), config.data.balance == "none"
    if isinstance(split, MixedSplit) and split.weights is not None:
        once = False
        number = split.weights / split.label_counts.sum(axis=1) @ split.label_counts
    drawn = np.where(number > 0, number ** BALANCE[config.data.balance], 0)
    return Corpus(name, list(counts), None if once else (drawn / drawn.sum()).tolist(), mean)


def _mean_lengths(config: Config, split: AnySplit) -> Lengths:
    data, every = config.data, slice(0, None, -(-len(split) // SAMPLE))
    seconds = np.minimum(split.index["duration_ms"][every] / 1000, data.max_seconds)
    tokens = np.minimum(2 + Positions(split, data, None)[every] / CHARACTERS, data.max_tokens)
    return Lengths(round(float(tokens.mean())), 1 + round(float(seconds.mean()) * FRAMES_PER_SECOND))
