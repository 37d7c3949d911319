"""What no type can say of a corpus: that its counts add up, and that its index points into its tars."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from jointfuse.data.index import UNLABELLED

CHUNK = 2**20  # rows of an index looked at together


def contradictions(info: dict[str, Any]) -> Iterator[str]:
    """Where corpus.json contradicts itself, a line each."""
    if not info["splits"]:
        yield "splits: there is none"
    speakers = set(info["speakers"])
    for name, split in info["splits"].items():
        shards, counts, lacking = split["shards"], split["label_counts"], split["lacking"]
        held = sum(shard["samples"] for shard in shards)
        if held != split["samples"]:
            yield f"splits.{name}: {split['samples']} samples, its shards have {held}"
        if len({shard["name"] for shard in shards}) < len(shards):
            yield f"splits.{name}: a shard is listed twice"
        if list(counts) != info["labels"]:
            yield f"splits.{name}: label_counts is of {', '.join(counts)}, labels are {', '.join(info['labels'])}"
        if sum(counts.values()) > split["samples"]:
            yield f"splits.{name}: label_counts add up to {sum(counts.values())} of {split['samples']} samples"
        if not lacking["both"] <= min(lacking["text"], lacking["clip"]) <= split["samples"]:
            yield f"splits.{name}: lacking does not fit {split['samples']} samples"
        if max(lacking["text"], lacking["clip"], split["dialogues"]) > split["samples"]:
            yield f"splits.{name}: more is counted than its {split['samples']} samples"
        if unknown := sorted(set(split["speakers"]) - speakers):
            yield f"splits.{name}: speaker {unknown[0]!r} is not among the corpus's speakers"


def row_fault(
    rows: np.ndarray, first: int, shard_bytes: np.ndarray, labels: int, speakers: int | None = None
) -> str | None:
    """What is wrong with the first entry that points nowhere, None where every one is sound.

    Args:
        rows: (n,) of INDEX_DTYPE.
        first: position of the first of them in the index.
        shard_bytes: (shards,) uint64.
        labels, speakers: how many there are; speakers are not looked at where that is not known.
    """
    known = rows["shard"] < len(shard_bytes)
    room = shard_bytes[np.where(known, rows["shard"], 0)] if len(shard_bytes) else np.zeros(len(rows), np.uint64)
    inside = (rows["offset"] <= room) & (rows["size"] <= room - np.minimum(rows["offset"], room))
    checks = {
        "shard": known,
        "offset": inside,
        "label": (rows["label"] < labels) | (rows["label"] == UNLABELLED),
        "speaker": np.ones(len(rows), bool) if speakers is None else rows["speaker"] < speakers,
    }
    sound = np.logical_and.reduce(list(checks.values()))
    if sound.all():
        return None
    bad = int(sound.argmin())
    column = next(name for name, holds in checks.items() if not holds[bad])
    return f"entry {first + bad}: {column} {int(rows[bad][column])} does not exist"


def index_fault(index: np.ndarray, shards: list[dict[str, Any]], labels: int, speakers: int) -> str | None:
    """Of a whole index, which is read from end to end: entries that point nowhere, shards or dialogues out of order."""
    shard_bytes = np.array([shard["bytes"] for shard in shards], dtype=np.uint64)
    ends = np.cumsum([shard["samples"] for shard in shards])
    dialogue = 0
    for first in range(0, len(index), CHUNK):
        rows = index[first : first + CHUNK]
        if fault := row_fault(rows, first, shard_bytes, labels, speakers):
            return fault
        expected = np.searchsorted(ends, np.arange(first, first + len(rows)), side="right")
        steps = np.diff(rows["dialogue"].astype(np.int64), prepend=dialogue)
        wrong = (rows["shard"] != expected) | (steps < 0) | (steps > 1)
        if wrong.any():
            bad = int(wrong.argmax())
            return (
                f"entry {first + bad}: shard {rows[bad]['shard']} or dialogue {rows[bad]['dialogue']} is out of order"
            )
        dialogue = int(rows["dialogue"][-1])
    return None
