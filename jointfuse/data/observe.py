"""What a corpus holds that is no fault of its files, but that whoever trains on it should know.

A clip and a text are compared by hashes of eight bytes: an utterance takes 32 bytes of memory, however long it is.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jointfuse.data.mel import INT16
from jointfuse.data.samples import Utterance
from jointfuse.data.sound import CLIPPED, CLIPPED_SHARE, FULL_SCALE

SILENT_DB = -60.0  # dB of full scale: a clip whose root mean square is below is silent
LISTED = 20  # of each kind are written out, the others counted
UNKNOWN_SPEAKER = "unknown"  # what a table without speakers gives every row
LACKING_CLASS = "split that lacks a class"
DIGEST = np.dtype([("key", "<u8"), ("dialogue", "<u8"), ("clip", "<u8"), ("text", "<u8")])  # 0: it has none


@dataclass
class Observations:
    """How often each kind was seen, and the first lines of each."""

    counts: Counter[str] = field(default_factory=Counter)
    lines: dict[str, list[str]] = field(default_factory=dict)

    def note(self, kind: str, line: str) -> None:
        self.counts[kind] += 1
        listed = self.lines.setdefault(kind, [])
        if len(listed) < LISTED:
            listed.append(line)

    def add(self, other: "Observations") -> None:
        """Those of `other` behind ours."""
        self.counts.update(other.counts)
        for kind, lines in other.lines.items():
            ours = self.lines.setdefault(kind, [])
            ours += lines[: LISTED - len(ours)]


def digest(content: bytes) -> int:
    """64 bits, never 0."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") or 1


def observe_clip(waveform: np.ndarray) -> Iterator[tuple[str, str]]:
    """(kind, what was found) of a clip, (S,) int16 with S > 0."""
    power = float(np.square(waveform, dtype=np.float32).mean(dtype=np.float64)) / 32768**2
    level = 10 * math.log10(power) if power else -math.inf
    if level < SILENT_DB:
        yield f"silent clip (below {SILENT_DB:.0f} dB)", "digital silence" if power == 0 else f"{level:.0f} dB"
    full_scale = round(FULL_SCALE * INT16)
    share = float(((waveform >= full_scale) | (waveform <= -full_scale)).mean())
    if share > CLIPPED_SHARE:
        yield CLIPPED, f"{share:.1%} of its samples at full scale"


def observe_times(utterance: Utterance, before: Utterance | None) -> Iterator[tuple[str, str]]:
    """(kind, what was found) of the start and end of an utterance; `before`: the turn before, of the same dialogue."""
    start, end = (_number(utterance.meta.get(name)) for name in ("start", "end"))
    if start is not None and end is not None and end <= start:
        yield "time that ends before it starts", f"from {start:g} to {end:g} s"
    earlier = _number(before.meta.get("start")) if before else None
    if start is not None and earlier is not None and start < earlier:
        yield "turn that starts before the turn before it", f"at {start:g} s, the turn before at {earlier:g} s"


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def not_numbers(value: Any, place: str = "") -> Iterator[str]:
    """Where in what JSON held a number is not one (NaN and infinities, which Python's JSON lets through)."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{place} is {value}, not a number"
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from not_numbers(inner, f"{place}.{name}" if place else str(name))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from not_numbers(inner, f"{place}[{number}]")


def repeated(hashes: np.ndarray) -> Iterator[np.ndarray]:
    """hashes (N,) uint64 -> the positions of each that is there more than once, ascending; 0 is nobody's.

    In the order of their first positions.
    """
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if len(ordered) else order
    ends = np.append(starts[1:], len(ordered))
    many = np.flatnonzero((ends - starts > 1) & (ordered[starts] != 0)) if len(ordered) else order
    for group in many[np.argsort(order[starts[many]], kind="stable")]:
        yield order[starts[group] : ends[group]]


def observe_speakers(splits: dict[str, Iterable[str]]) -> Iterator[tuple[str, str]]:
    """(split, what was found) wherever speakers of the training split speak elsewhere too."""
    train = set(splits.get("train", ())) - {UNKNOWN_SPEAKER}
    for split, speakers in splits.items():
        shared = sorted(train & set(speakers)) if split != "train" else []
        if shared:
            yield split, f"{len(shared)} of {len(set(speakers))} speakers are in train too: {_some(shared)}"


def observe_classes(splits: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """(split, what was found) wherever a split has no utterance of a class; `splits` as in corpus.json."""
    for split, content in splits.items():
        absent = [label for label, count in content["label_counts"].items() if not count]
        if absent:
            yield split, f"no utterance of {_some(absent)}"


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
