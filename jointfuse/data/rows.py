"""What a corpus is to be built from: rows, how their sound is made, and what is wrong with both."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Row:
    """One utterance to come. `start` and `end` are seconds in the dialogue's recording, or None.

    One without a label (None) is heard before those behind it, and is in no way trained on or scored.
    """

    dialogue: str
    turn: int
    speaker: str
    label: int | None
    text: str
    clip: Any  # what the corpus's `render` needs to make the sound; None: no clip
    identity: str  # names the sound for the fingerprint, without paths of this machine
    origin: str  # for messages: where the row comes from
    start: float | None = None
    end: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # further entries of the sample's JSON
    file: Path | None = None  # that the sound is in: its content is part of the fingerprint


@dataclass(frozen=True)
class Fault:
    """Something wrong in what a corpus is made from, and what was done about it: an entry of corpus.json's `faults`.

    `fault` and `done` are to be read, and like `file` they name no path of this machine.
    """

    split: str  # empty, where it is in none
    file: str
    fault: str
    done: str
    utterance: tuple[str, int] | None = None  # dialogue and turn, where it concerns one that is in the corpus


@dataclass(frozen=True)
class ObservedClip:
    """What `render` gives in the place of a waveform of which one should know what it does not show."""

    waveform: np.ndarray  # (S,) float32 at 16 kHz
    observed: tuple[tuple[str, str], ...]  # kind, what was found


@dataclass(frozen=True)
class FaultyClip:
    """What `render` gives in the place of a waveform that was not as expected; the fields are those of Fault."""

    waveform: np.ndarray | None  # (S,) float32 at 16 kHz, or None: the utterance is kept without a clip
    file: str
    fault: str
    done: str
    kept: Literal["utterance", "context", "nothing"] = "utterance"  # context: heard before others, without its label
    observed: tuple[tuple[str, str], ...] = ()


Render = Callable[[Sequence[Row]], Iterator[np.ndarray | ObservedClip | FaultyClip | None]]


@dataclass(frozen=True)
class CorpusSpec:
    """Everything a corpus will hold, before any sound is made.

    `render` turns the rows of one shard, in order, into waveforms (S,) float32 at 16 kHz (None: no clip; FaultyClip,
    ObservedClip: one to be named). It runs in another process, so it must be importable by name. `faults` are those
    known before.
    """

    name: str
    labels: Sequence[str]
    splits: dict[str, list[list[Row]]]  # split -> dialogues -> turns in order
    render: Render
    source: str
    licence: str
    description: str
    synthetic: bool = False
    speaker_independent: bool = False  # no speaker of train is in another split; verify.py holds the corpus to it
    fresh_process: bool = False  # one new process a shard, for synthesisers whose output depends on earlier calls
    faults: Sequence[Fault] = ()
    # Split, or "" -> "read", and why a row is no utterance -> rows of the source.
    rows: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    notes: Sequence[str] = ()  # how the source was understood, for whoever builds
