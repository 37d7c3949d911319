"""The clips of rows that name a sound file: heard, cut out of a recording where they are parts of one, and checked."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jointfuse.data.mel import SAMPLE_RATE
from jointfuse.data.rows import FaultyClip, ObservedClip, Row
from jointfuse.data.sound import EmptyAudio, MediaError, NoAudioTrack, Sound, Undecodable
from jointfuse.data.soundfiles import hear
from jointfuse.errors import UserError

TOLERANCE = 0.5  # seconds by which a clip and the times of its row may differ
OVERHANG = 0.1  # seconds by which a part may end after its recording
OVERLAP = "part of a recording that overlaps another row's"
WORDS = {Undecodable: "is unreadable ({})", NoAudioTrack: "has {}", EmptyAudio: "is empty: {}"}


@dataclass(frozen=True)
class Part:
    """What a row with start and end says of its file: a part of a recording, or a clip that was cut out of one."""

    path: Path
    start: float  # seconds
    end: float
    shared: bool  # another row names other times of the file, so it is a recording
    overlaps: bool  # another row's part overlaps this one


Clip = np.ndarray | ObservedClip | None


def read_clips(rows: Sequence[Row]) -> Iterator[Clip]:
    """Each row's clip, at 16 kHz, or None. Raises UserError naming row and clip."""
    recordings = _Recordings(rows)
    for number, row in enumerate(rows):
        try:
            yield recordings.clip(number)
        except (MediaError, OSError) as error:
            path = row.clip.path if isinstance(row.clip, Part) else row.clip
            raise UserError(f"{row.origin}: clip {path} {words(error)}; replace it or drop the row") from error


def read_sound_clips(rows: Sequence[Row]) -> Iterator[Clip | FaultyClip]:
    """Each row's clip, at 16 kHz, or None, or the fault for which its row is left out. An identity names a file."""
    for row in rows:
        try:
            yield None if row.clip is None else _observed(hear(row.clip))
        except (MediaError, OSError) as error:
            yield FaultyClip(None, row.identity, words(error), "left out", kept="nothing")


def load_clip(path: Path) -> np.ndarray:
    """A sound file of any format, rate and channel count as (S,) float32, 16 kHz mono, peak at most 1.

    Raises MediaError, or OSError where it may not be read.
    """
    return hear(path).waveform


def words(error: MediaError | OSError) -> str:
    """What is wrong with a clip, to stand behind its name."""
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror})"
    return WORDS.get(type(error), "{}").format(error)


class _Recordings:
    """The clips of one shard's rows. A recording is decoded once: all of the rows' parts are cut out of it then."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows
        self._parts: dict[int, Clip] = {}  # by the row's position: cut, but not asked for yet
        self._positions: dict[Path, list[int]] = {}
        for number, row in enumerate(rows):
            if isinstance(row.clip, Part):
                self._positions.setdefault(row.clip.path, []).append(number)

    def clip(self, number: int) -> Clip:
        """Of the row at this position, once. Raises MediaError, OSError, and UserError where its times cannot be."""
        clip = self._rows[number].clip
        if clip is None:
            return None
        if not isinstance(clip, Part):
            return _observed(hear(clip))
        if number not in self._parts:
            sound = hear(clip.path)
            self._parts |= {one: _part(sound, self._rows[one]) for one in self._positions[clip.path]}
        return self._parts.pop(number)


def _observed(sound: Sound) -> Clip:
    observed = tuple(sound.observed())
    return ObservedClip(sound.waveform, observed) if observed else sound.waveform


def _part(sound: Sound, row: Row) -> Clip:
    """A row's part of its file's sound; all of it, where it is as long as the row says. Raises UserError."""
    part: Part = row.clip
    if not part.shared and abs(sound.seconds - (part.end - part.start)) <= TOLERANCE:
        return _observed(sound)
    if part.start >= sound.seconds or part.end > sound.seconds + OVERHANG:
        raise UserError(
            f"{row.origin}: {part.path} lasts {sound.seconds:.2f} s, the row is from {part.start:g} to {part.end:g} s; "
            + ("mend the times" if part.shared else "mend them, or, if the clip is cut already, give --times recorded")
        )
    waveform = sound.waveform[round(part.start * SAMPLE_RATE) : round(part.end * SAMPLE_RATE)].copy()
    observed = [*sound.observed(part.start, part.end)]
    if part.overlaps:
        observed.append((OVERLAP, f"{part.start:g} to {part.end:g} s of {part.path.name}"))
    return ObservedClip(waveform, tuple(observed)) if observed else waveform
