"""A synthetic demo corpus: dialogues spoken by espeak-ng, in which words and voice each tell half of the emotion.

The words are plain, positive or negative; the voice is level, raised or lowered against its speaker's own habit. Only
the pair names the emotion, so that a model of one modality stays well below a model of both. Labels, their order and
their imbalance are MELD's. No voice is heard in two splits.
"""

import ctypes
import importlib.util
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.signal import lfilter, resample_poly

from jointfuse.data.mel import SAMPLE_RATE
from jointfuse.data.rows import CorpusSpec, Row
from jointfuse.errors import UserError

# emotion: (share of utterances, words, voice)
EMOTIONS = {
    "neutral": (0.47, "plain", "level"),
    "joy": (0.17, "positive", "raised"),
    "surprise": (0.12, "plain", "raised"),
    "anger": (0.11, "negative", "raised"),
    "sadness": (0.07, "negative", "lowered"),
    "disgust": (0.03, "negative", "level"),
    "fear": (0.03, "plain", "lowered"),
}
INERTIA = 0.15  # probability that a turn keeps the emotion of the turn before
DEV_SHARE, TEST_SHARE = 50 / 290, 72 / 290  # dialogues, relative to the training split
DESCRIPTION = (
    "Synthetic: sentences from templates, spoken by espeak-ng. The emotion is the pair of wording and voice: "
    + ", ".join(f"{emotion} = {words} words + {voice} voice" for emotion, (_, words, voice) in EMOTIONS.items())
    + ". Raised: higher, faster, louder, brighter, wider in pitch than the speaker's habit; lowered: the reverse. "
    "Made to try software on; it says nothing about human emotion."
)


@dataclass(frozen=True)
class Speech:
    """How one utterance is spoken. Pitch and range are espeak-ng's 0 to 99."""

    voice: str
    pitch: int
    range: int
    words_per_minute: int
    level: float  # dB below full scale, root mean square
    effort: float  # spectral tilt by y[n] = x[n] - effort x[n-1]: above 0 brighter, below 0 duller


@dataclass(frozen=True)
class _Shift:
    """What a voice does to its speaker's habit at strength 1."""

    pitch: float = 0.0
    range: float = 0.0
    rate: float = 0.0  # natural logarithm
    level: float = 0.0  # dB
    effort: float = 0.0


VOICES = {
    "level": _Shift(),
    "raised": _Shift(pitch=34, range=40, rate=0.34, level=7, effort=0.5),
    "lowered": _Shift(pitch=-32, range=-40, rate=-0.38, level=-7, effort=-0.5),
}


def spoken_corpus(name: str, dialogues: int = 290, seed: int = 0) -> CorpusSpec:
    """The script of a corpus with `dialogues` training dialogues of 4 to 10 turns, and dev and test in proportion.

    Raises:
        UserError: espeakng_loader is not installed, or fewer than one dialogue is asked for.
    """
    if importlib.util.find_spec("espeakng_loader") is None:
        raise UserError("the spoken corpus needs espeak-ng: pip install 'jointfuse[demo]'")
    if dialogues < 1:
        raise UserError("--dialogues is at least 1")
    sizes = {
        "train": dialogues,
        "dev": max(1, round(dialogues * DEV_SHARE)),
        "test": max(1, round(dialogues * TEST_SHARE)),
    }
    return CorpusSpec(
        name=name,
        labels=list(EMOTIONS),
        splits={split: [_dialogue(split, n, seed) for n in range(size)] for split, size in sizes.items()},
        render=speak,
        source=f"espeak-ng through the espeakng-loader package, templates of jointfuse, seed {seed}",
        licence="no rights claimed in the output; espeak-ng itself is GPL-3.0-or-later",
        description=DESCRIPTION,
        synthetic=True,
        fresh_process=True,
    )


# -------------------------------------------------------------------------------------------------------------- script


@cache
def _script() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return content


def _dialogue(split: str, number: int, seed: int) -> list[Row]:
    """One dialogue. It depends on its own number alone, so a larger corpus starts with the smaller one."""
    script, rng = _script(), random.Random(f"{seed} {split} {number}")
    name = f"{split}_{number:05d}"
    speakers = rng.sample(sorted(script["voices"][split]), rng.choice((2, 2, 3)))
    things = script["topics"][rng.choice(sorted(script["topics"]))]
    rows: list[Row] = []
    emotion = speaker = ""
    for turn in range(rng.randint(4, 10)):
        if not emotion or rng.random() >= INERTIA:
            emotion = rng.choices(list(EMOTIONS), [share for share, _, _ in EMOTIONS.values()])[0]
        speaker = rng.choice([one for one in speakers if one != speaker])
        _, words, voice = EMOTIONS[emotion]
        speech = _speech(script["voices"][split][speaker], voice, rng, seed)
        rows.append(
            Row(
                dialogue=name,
                turn=turn,
                speaker=speaker,
                label=list(EMOTIONS).index(emotion),
                text=_sentence(words, things, rng),
                clip=speech,
                identity=repr(sorted(asdict(speech).items())),
                origin=f"dialogue {name} turn {turn}",
                extra={"words": words, "voice": voice},
            )
        )
    return rows


def _sentence(words: str, things: list[str], rng: random.Random) -> str:
    script = _script()
    slots = {slot: rng.choice(fillers) for slot, fillers in script["slots"].items()}
    sentence: str = rng.choice(script["frames"][words]).format(thing=rng.choice(things), **slots)
    return sentence[0].upper() + sentence[1:] + "."


def _speech(voice: str, manner: str, rng: random.Random, seed: int) -> Speech:
    """The speaker's habit, moved by the manner at a strength that varies, with a jitter of its own."""
    habit = random.Random(f"{seed} {voice}")
    pitch, spread = habit.uniform(42, 56), habit.uniform(40, 56)
    rate, level, effort = habit.uniform(174, 188), habit.uniform(-26, -22), habit.uniform(-0.1, 0.1)
    shift, strength = VOICES[manner], rng.uniform(0.8, 1.2)
    return Speech(
        voice=voice,
        pitch=_within(pitch + shift.pitch * strength + rng.gauss(0, 3)),
        range=_within(spread + shift.range * strength + rng.gauss(0, 6)),
        words_per_minute=round(rate * math.exp(shift.rate * strength + rng.gauss(0, 0.05))),
        level=round(level + shift.level * strength + rng.gauss(0, 1.5), 2),
        effort=round(effort + shift.effort * strength + rng.gauss(0, 0.05), 3),
    )


def _within(value: float) -> int:
    return min(max(round(value), 0), 99)


# --------------------------------------------------------------------------------------------------------------- sound


def speak(rows: Sequence[Row]) -> Iterator[np.ndarray | None]:
    """Each row's speech, (S,) float32 at 16 kHz.

    espeak-ng carries state from one utterance into the next: the same rows give the same samples only in a process
    that has not spoken before.
    """
    synthesiser = _Espeak()
    for row in rows:
        speech: Speech = row.clip
        waveform = synthesiser(row.text, speech)
        common = math.gcd(synthesiser.rate, SAMPLE_RATE)
        waveform = resample_poly(waveform, SAMPLE_RATE // common, synthesiser.rate // common)
        waveform = lfilter([1.0, -speech.effort], [1.0], waveform)
        # Variants differ in loudness by a factor of ten; here loudness belongs to speaker and manner.
        waveform = waveform * (10 ** (speech.level / 20) / max(float(waveform.std()), 1e-4))
        yield (waveform / max(1.0, float(np.abs(waveform).max()))).astype(np.float32)


class _Espeak:
    """The espeak-ng library, in this process, without a sound card."""

    SYNCHRONOUS, UTF8 = 2, 1
    RATE, VOLUME, PITCH, RANGE = 1, 2, 3, 4  # its parameters' numbers

    def __init__(self) -> None:
        import espeakng_loader

        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        self.rate: int = self._library.espeak_Initialize(
            self.SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), 0
        )
        if self.rate <= 0:
            raise UserError("espeak-ng does not start: reinstall it by pip install --force-reinstall espeakng-loader")
        # The breath of voices such as f2 is noise from a generator that the library seeds by the clock.
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        self._parts: list[np.ndarray] = []
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self._callback = kind(self._receive)  # kept, or it would be collected while the library still calls it
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples: Any, count: int, events: int | None) -> int:
        if samples and count > 0:
            self._parts.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def __call__(self, text: str, speech: Speech) -> np.ndarray:
        """(S,) float64 in [-1, 1] at `self.rate`."""
        self._parts.clear()
        if self._library.espeak_SetVoiceByName(speech.voice.encode()) != 0:
            raise UserError(f"espeak-ng has no voice {speech.voice!r}: install espeakng-loader 0.2.4 or newer")
        settings = {
            self.RATE: speech.words_per_minute,
            self.VOLUME: 60,  # some variants clip at the usual 100
            self.PITCH: speech.pitch,
            self.RANGE: speech.range,
        }
        for parameter, value in settings.items():
            self._library.espeak_SetParameter(parameter, value, 0)
        data = text.encode()
        self._library.espeak_Synth(data, ctypes.c_size_t(len(data) + 1), 0, 1, 0, self.UTF8, None, None)
        if not self._parts:
            raise UserError(f"espeak-ng gave no sound for {text!r} in voice {speech.voice!r}")
        return np.concatenate(self._parts) / 32768.0
