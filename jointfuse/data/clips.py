"""The clips of rows that name a sound file: read, checked, and brought to 16 kHz mono."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import soundfile

from jointfuse.data.build import Row
from jointfuse.data.media import mono
from jointfuse.errors import UserError


def read_clips(rows: Sequence[Row]) -> Iterator[np.ndarray | None]:
    """Each row's clip, (S,) float32 at 16 kHz, or None. Raises UserError naming row and clip."""
    for row in rows:
        if row.clip is None:
            yield None
            continue
        try:
            yield load_clip(row.clip)
        except (ValueError, OSError, soundfile.SoundFileError) as error:
            raise UserError(f"{row.origin}: clip {row.clip} {error}; replace it or drop the row") from error


def load_clip(path: Path) -> np.ndarray:
    """A sound file of any rate and channel count as (S,) float32, 16 kHz mono, peak at most 1.

    Raises:
        ValueError: it cannot be read, holds no samples, or holds values that are not numbers.
    """
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise ValueError(f"is unreadable ({error})") from error
    if len(samples) == 0:
        raise ValueError("is empty: 0 samples")
    if not np.isfinite(samples).all():
        raise ValueError("holds values that are not numbers (NaN or infinity)")
    return mono(samples, rate)
