"""What a plan asks of an index, computed for the utterances that it asks about."""

from typing import Literal

import numpy as np

from jointfuse.config import DataSettings
from jointfuse.data.features import FRAMES_PER_SECOND, MEL_BINS
from jointfuse.data.shards import Split


class Positions:
    """How many positions each utterance of a split takes, computed for those that are asked for.

    Args:
        settings: seconds of a clip that are heard, turns that are read before a text.
        patch: (bins, frames); None: characters are counted.
    """

    def __init__(self, split: Split, settings: DataSettings, patch: tuple[int, int] | None) -> None:
        self.split, self.settings, self.patch = split, settings, patch

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, ids: np.ndarray | slice) -> np.ndarray:
        index = self.split.index
        if not self.patch:
            rows = np.arange(len(self))[ids] if isinstance(ids, slice) else ids
            characters = index["characters"][rows].astype(np.int64)
            for turns in range(1, self.settings.context + 1):
                before = np.maximum(rows - turns, 0)
                same = (index["dialogue"][before] == index["dialogue"][rows]) & (rows >= turns)
                characters += same * index["characters"][before]
            return characters
        heard = np.minimum(index["duration_ms"][ids], self.settings.max_seconds * 1000)
        frames = (heard > 0) + (heard * (FRAMES_PER_SECOND / 1000)).astype(np.int64)
        return -(-frames // self.patch[1]) * (MEL_BINS // self.patch[0])


class Weights:
    """How often each utterance of a split is to be drawn, for those that are asked for; 1 on average.

    Args:
        balance: class: every class as often; sqrt: a class by the square root of its number (Mahajan et al. 2018).
    """

    def __init__(self, split: Split, balance: Literal["sqrt", "class"]) -> None:
        self.split = split
        counts = np.array(list(split.info["label_counts"].values()), dtype=np.float64)
        share = np.sqrt(counts) if balance == "sqrt" else (counts > 0).astype(np.float64)
        self.of_label = len(split) * share / share.sum() / np.maximum(counts, 1)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, ids: np.ndarray) -> np.ndarray:
        return self.of_label[self.split.index["label"][ids]]
