"""What a plan asks of an index, computed for the utterances that it asks about."""

from typing import Literal

import numpy as np

from jointfuse.config import DataSettings
from jointfuse.data.mel import FRAMES_PER_SECOND, MEL_BINS
from jointfuse.data.mixture import AnySplit, MixedSplit


class Positions:
    """How many positions each utterance of a split takes, computed for those that are asked for.

    Args:
        settings: seconds of a clip that are heard, turns that are read before a text.
        patch: (bins, frames); None: characters are counted.
    """

    def __init__(self, split: AnySplit, settings: DataSettings, patch: tuple[int, int] | None) -> None:
        self.split, self.settings, self.patch = split, settings, patch

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, ids: np.ndarray | slice) -> np.ndarray:
        index = self.split.index
        if not self.patch:
            rows = np.arange(len(self))[ids] if isinstance(ids, slice) else ids
            return index["characters"][rows] + self.split.characters_before(rows, self.settings.context)
        heard = np.minimum(index["duration_ms"][ids], self.settings.max_seconds * 1000)
        frames = (heard > 0) + (heard * (FRAMES_PER_SECOND / 1000)).astype(np.int64)
        return -(-frames // self.patch[1]) * (MEL_BINS // self.patch[0])


class Weights:
    """How often each utterance of a split is to be drawn, for those that are asked for; 1 on average.

    Args:
        split: of a mixture: corpora have the shares that their weights give them, and what these make of the number of
            each class is what `balance` goes by.
        balance: class: every class as often; sqrt: a class by the square root of its number (Mahajan et al. 2018).
    """

    def __init__(self, split: AnySplit, balance: Literal["none", "sqrt", "class"]) -> None:
        self.split = split
        counts = np.array([list(split.info["label_counts"].values())], dtype=np.float64)  # (corpora, C)
        share_of = np.ones(1)  # (corpora,) of an epoch, over its number of utterances
        if isinstance(split, MixedSplit):
            counts = split.label_counts.astype(np.float64)
            share_of = np.ones(len(counts)) if split.weights is None else split.weights / counts.sum(axis=1)
        number = share_of @ counts  # (C,)
        wanted = {"none": number, "sqrt": np.sqrt(number), "class": (number > 0).astype(np.float64)}[balance]
        factor = wanted / np.where(number > 0, number, 1)
        self.of_label = len(split) / wanted.sum() * share_of[:, None] * factor  # (corpora, C)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, ids: np.ndarray) -> np.ndarray:
        labels = self.split.index["label"][ids]
        if isinstance(self.split, MixedSplit):
            return self.of_label[self.split.part_of(ids), labels]
        self.split.check_labels(labels)
        return self.of_label[0, labels]
