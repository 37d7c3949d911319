"""What stands beside the tars: the index of a split, and the mel statistics."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

FORMAT = 2  # of the folder; a reader refuses any other
UNLABELLED = 2**16 - 1  # as a label: heard before other utterances, never trained on or scored
INDEX_DTYPE = np.dtype(
    [
        ("shard", "<u4"),
        ("offset", "<u8"),  # first byte of the sample's first tar header
        ("size", "<u4"),  # bytes of all its members, headers and padding included
        ("duration_ms", "<u4"),  # 0: no clip
        ("characters", "<u4"),  # 0: no text
        ("label", "<u2"),
        ("speaker", "<u4"),  # position in the corpus's list of speakers
        ("dialogue", "<u4"),  # running number within the split
        ("turn", "<u4"),
    ]
)


def index_rows(sidecars: Iterable[dict[str, Any]], speakers: Sequence[str]) -> np.ndarray:
    """A split's index, (samples,) of INDEX_DTYPE, from its sidecars in shard order and the corpus's speakers."""
    number_of = {speaker: number for number, speaker in enumerate(speakers)}
    parts = [np.zeros(0, dtype=INDEX_DTYPE)]  # an array a shard: the rows as Python's numbers take ten times as much
    dialogue, last = -1, None
    for shard, sidecar in enumerate(sidecars):
        rows = []
        for sample in sidecar["samples"]:
            if sample["dialogue"] != last:
                dialogue, last = dialogue + 1, sample["dialogue"]
            # A clip of under half a millisecond is still a clip.
            milliseconds = max(1, round(sample["duration"] * 1000)) if sample["duration"] else 0
            rows.append(
                (
                    shard,
                    sample["offset"],
                    sample["size"],
                    milliseconds,
                    sample["characters"],
                    sample["label"],
                    number_of[sample["speaker"]],
                    dialogue,
                    sample["turn"],
                )
            )
        parts.append(np.array(rows, dtype=INDEX_DTYPE))
    return np.concatenate(parts)


def split_record(samples: Iterable[dict[str, Any]], labels: Sequence[str]) -> dict[str, Any]:
    """What corpus.json says of a split besides its shards, from the samples of its sidecars."""
    number, seconds, emotions = 0, 0.0, Counter[str]()
    lacking = {"text": 0, "clip": 0, "both": 0}
    dialogues, speakers = set(), set()
    for sample in samples:
        number += 1
        seconds += sample["duration"]
        emotions[sample["emotion"]] += 1
        lacking["text"] += not sample["characters"]
        lacking["clip"] += not sample["duration"]
        lacking["both"] += not sample["characters"] and not sample["duration"]
        dialogues.add(sample["dialogue"])
        speakers.add(sample["speaker"])
    return {
        "samples": number,
        "dialogues": len(dialogues),
        "seconds": round(seconds, 3),
        "lacking": lacking,
        "label_counts": {label: emotions[label] for label in labels},
        "speakers": sorted(speakers),
    }


def mel_statistics(sidecars: Iterable[dict[str, Any]]) -> tuple[float, float]:
    """Mean and deviation of the log-mel of the training split, from the sums in its sidecars.

    Without a single clip, (0, 1): the numbers that change nothing.
    """
    count, total, squares = 0, 0.0, 0.0
    for sums in (sidecar["mel"] for sidecar in sidecars):
        count, total, squares = count + sums["count"], total + sums["sum"], squares + sums["squares"]
    if not count:
        return 0.0, 1.0
    mean = total / count
    return mean, math.sqrt(max(squares / count - mean**2, 0.0)) or 1.0


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"
