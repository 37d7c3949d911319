"""Corpora in the folder layout of their original distribution: generated speech or tones, labels of our own."""

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import soundfile
import yaml
from corpus_helpers import write_clip
from training_fixtures import RECIPE, train

from jointfuse.data.corpora.spoken import Speech, speak
from jointfuse.data.rows import Row

# What evaluators write for the codes of IEMOCAP's label files.
NAMES = {
    "hap": "Happiness",
    "sad": "Sadness",
    "neu": "Neutral",
    "ang": "Anger",
    "exc": "Excited",
    "fru": "Frustration",
    "sur": "Surprise",
    "fea": "Fear",
    "dis": "Disgust",
    "oth": "Other",
}
SENTENCES = (
    "Excuse me.",
    "Do you have your forms?",
    "Yeah.",
    "Let me see them.",
    "Is there a problem?",
    "Who told you?",
)


def turns_of(counts: Mapping[str, int], each: int) -> Iterator[tuple[str, list[str]]]:
    """(dialogue, labels of its turns), `each` turns a dialogue, sessions and actors with markers in alternation."""
    codes = [code for code, count in counts.items() for _ in range(count)]
    random.Random(0).shuffle(codes)
    for number, first in enumerate(range(0, len(codes), each)):
        session, rest = number % 5 + 1, number // 5
        yield f"Ses0{session}{'FM'[rest % 2]}_impro{rest // 2 + 1:02d}", codes[first : first + each]


def make_iemocap(folder: Path, counts: Mapping[str, int], each: int = 8, clips: int | None = None) -> Path:
    """IEMOCAP_full_release with `counts` turns by label, of generated speech. Label files list the woman's turns first.

    Args:
        each: turns a dialogue.
        clips: only the first so many turns of every dialogue have one.
    """
    root = folder / "IEMOCAP_full_release"
    to_speak: list[tuple[Path, Row]] = []
    for dialogue, codes in turns_of(counts, each):
        session = root / f"Session{dialogue[4]}"
        blocks, lines, said = [], [], {"F": 0, "M": 0}
        for number, code in enumerate(codes):
            who = "FM"[number % 2]
            name = f"{dialogue}_{who}{said[who]:03d}"
            said[who] += 1
            start, end = 2.5 * number + 1, 2.5 * number + 3.2
            text = SENTENCES[(number + len(dialogue)) % len(SENTENCES)]
            # An undecided turn: as many evaluators for happiness as for anger.
            votes = ("hap", "ang", "sur", "neu") if code == "xxx" else (code, code, "hap")
            blocks.append((who, start, _block(name, code, start, end, votes)))
            lines.append(f"{name} [{start:08.4f}-{end:08.4f}]: {text}")
            clip = session / "sentences" / "wav" / dialogue / f"{name}.wav"
            if clips is None or number < clips:
                to_speak.append((clip, _spoken(text, who, len(to_speak), code)))
        header = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
        _write(
            session / "dialog" / "EmoEvaluation" / f"{dialogue}.txt", header + "\n".join(b for *_, b in sorted(blocks))
        )
        _write(session / "dialog" / "transcriptions" / f"{dialogue}.txt", "".join(f"{line}\n" for line in lines))
    for (clip, _), waveform in zip(to_speak, speak([row for _, row in to_speak]), strict=True):
        clip.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(clip, waveform, 16_000)
    return root


def _block(name: str, code: str, start: float, end: float, votes: tuple[str, ...]) -> str:
    evaluators = "".join(f"C-E{number}:\t{NAMES[vote]};\t()\n" for number, vote in enumerate(votes, 2))
    actor = f"C-{name.rpartition('_')[2][0]}1:\tHappiness; Sadness;\t()\nA-E3:\tval 3; act 2; dom  2;\t()\n"
    return f"[{start:.4f} - {end:.4f}]\t{name}\t{code}\t[2.5000, 3.0000, 3.5000]\n{evaluators}{actor}"


def _spoken(text: str, who: str, number: int, code: str) -> Row:
    voice, pitch = {"F": ("en-us+f3", 60), "M": ("en-us+m3", 35)}[who]
    speech = Speech(voice, min(99, pitch + 3 * (sum(map(ord, code)) % 10)), 50, 260 + number % 40, -22.0, 0.0)
    return Row(dialogue="", turn=0, speaker="", label=0, text=text, clip=speech, identity="", origin="")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def make_ravdess(folder: Path, actors: Iterable[int] = range(1, 25)) -> Path:
    """Actor_NN/03-01-EE-01-SS-RR-NN.wav as the archive unpacks, of tones."""
    root = folder / "RAVDESS"
    for number, (actor, emotion, text) in enumerate(itertools.product(actors, range(1, 9), (1, 2))):
        name = f"03-01-{emotion:02d}-01-{text:02d}-01-{actor:02d}.wav"
        write_clip(root / f"Actor_{actor:02d}" / name, 0.1 + 0.0005 * number, 48_000, pitch=150 + 90 * emotion + actor)
    return root


def train_each(corpora: dict[str, Path], folder: Path) -> dict[str, Any]:
    """Twenty steps of the tiny recipe on each, in this rank: the losses, (20, 3), by name."""
    losses = {}
    for name, corpus in corpora.items():
        recipe = folder / f"{name}.yaml"
        recipe.write_text(yaml.safe_dump(RECIPE | {"data": RECIPE["data"] | {"corpus": str(corpus)}}), encoding="utf-8")
        losses[name] = train(recipe, folder / name).losses
    return losses
