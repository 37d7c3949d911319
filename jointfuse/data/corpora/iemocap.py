"""IEMOCAP as it is distributed: five sessions of two actors, their turns, transcripts, labels and clips.

    Session1/dialog/EmoEvaluation/Ses01F_impro01.txt             one block a turn; its first line is the summary
    Session1/dialog/transcriptions/Ses01F_impro01.txt
    Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav

The letter in a dialogue's name says who wears the markers; the one at the end of a turn's name says who speaks.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jointfuse.data.build import CorpusSpec, Fault, Row
from jointfuse.data.clips import read_sound_clips
from jointfuse.data.corpora.files import some, unusable
from jointfuse.errors import UserError

LABELS = {
    "hap": "happy",
    "sad": "sad",
    "neu": "neutral",
    "ang": "angry",
    "exc": "excited",
    "fru": "frustrated",
    "sur": "surprised",
    "fea": "fearful",
    "dis": "disgusted",
    "oth": "other",
    "xxx": "undecided",  # no majority among the evaluators
}
# View -> code of the label files -> class; codes that are not named are left out. Classes in order of appearance.
VIEWS: dict[str, dict[str, str]] = {
    "six": {code: LABELS[code] for code in ("hap", "sad", "neu", "ang", "exc", "fru")},
    "four": {"ang": "angry", "hap": "happy", "exc": "happy", "sad": "sad", "neu": "neutral"},
    "all": LABELS,
}
SESSIONS = (1, 2, 3, 4, 5)

NUMBER = r"(-?\d+(?:\.\d+)?)"
SUMMARY = re.compile(rf"\[{NUMBER} - {NUMBER}\]\t(\w+)\t(\w+)\t\[{NUMBER}, {NUMBER}, {NUMBER}\]")
VOTE = re.compile(r"C-E\d+:\t([^\t(]*)")  # C-F1 and C-M1 are the actors' own; the majority is the evaluators'
SPOKEN = re.compile(r"(Ses\w+)\s*\[[^\]]*\]\s*:\s*(.*)")
NAMELESS = re.compile(r"[MF]:")


@dataclass(frozen=True)
class Turn:
    """One turn as the label file has it. `code` is a key of LABELS; times are seconds of the dialogue's recording."""

    name: str
    dialogue: str
    session: int
    number: int  # its place in the dialogue, both speakers interleaved, from 0
    start: float
    end: float
    code: str
    attributes: tuple[float, float, float]  # valence, arousal, dominance: means of the evaluators, 1 to 5
    votes: tuple[str, ...]  # codes the evaluators gave, one evaluator's several after one another
    text: str | None
    clip: Path | None
    origin: str

    @property
    def speaker(self) -> str:
        return self.dialogue[:5] + self.name.rpartition("_")[2][0]


@dataclass
class Release:
    """All turns of a release, by dialogue and in order, and what was found amiss on the way."""

    path: Path
    turns: list[Turn]
    faults: list[tuple[str, Fault]] = field(default_factory=list)  # with their dialogue, or ""; splits come later

    def count(self, codes: Mapping[str, Any]) -> int:
        return sum(turn.code in codes for turn in self.turns)

    @property
    def codes(self) -> Counter[str]:
        return Counter(turn.code for turn in self.turns)


def read_release(raw: str | Path) -> Release:
    """Read the label files and transcripts of IEMOCAP_full_release, or of the folder it lies in, and find the clips.

    Raises:
        UserError: it is no such folder, a session is missing, or a label file is not of the known form.
    """
    path = Path(raw)
    if path.is_file():
        raise UserError(f"{path}: a file; unpack the archive and give the folder IEMOCAP_full_release")
    if (path / "IEMOCAP_full_release").is_dir():
        path = path / "IEMOCAP_full_release"
    for session in SESSIONS:
        if not (path / f"Session{session}" / "dialog" / "EmoEvaluation").is_dir():
            raise UserError(
                f"{path}: no folder Session{session}/dialog/EmoEvaluation; "
                "give IEMOCAP_full_release, unpacked, with Session1 to Session5"
            )
    release = Release(path, [])
    for session in SESSIONS:
        _read_session(release, session)
    return release


def iemocap_corpus(
    release: Release, name: str, view: str = "six", test_session: int = 5, dev: float = 0.1
) -> CorpusSpec:
    """The corpus of one view, one session left out of training as the test split.

    Args:
        view: a key of VIEWS.
        dev: below 1, a share of each remaining session's dialogues, always the same ones: what the field does, but the
            speakers of dev are then those of train; 1 to 5, a session of its own.

    Raises:
        UserError: no such view or session.
    """
    if view not in VIEWS:
        raise UserError(f"--view {view}: no such view; choose {', '.join(VIEWS)}")
    if test_session not in SESSIONS:
        raise UserError(f"--test-session {test_session}: IEMOCAP has sessions 1 to 5")
    if not (0 < dev < 1 or (dev in SESSIONS and dev != test_session)):
        raise UserError(f"--dev {dev:g}: give a share between 0 and 1, or a session other than the one of the test")
    homes = _homes(release, test_session, dev)
    classes = list(dict.fromkeys(VIEWS[view].values()))
    splits: dict[str, dict[str, list[Row]]] = {"train": {}, "dev": {}, "test": {}}
    for turn in release.turns:
        if turn.code not in VIEWS[view] or turn.text is None or turn.clip is None:
            continue
        relative = turn.clip.relative_to(release.path).as_posix()
        row = Row(
            dialogue=turn.dialogue,
            turn=turn.number,
            speaker=turn.speaker,
            label=classes.index(VIEWS[view][turn.code]),
            text=turn.text,
            clip=turn.clip,
            identity=relative,
            origin=turn.origin,
            start=turn.start,
            end=turn.end,
            extra=dict(zip(("valence", "arousal", "dominance"), turn.attributes, strict=True)),
            file=turn.clip,
        )
        splits[homes[turn.dialogue]].setdefault(turn.dialogue, []).append(row)
    return CorpusSpec(
        name=name,
        labels=classes,
        splits={split: list(dialogues.values()) for split, dialogues in splits.items()},
        render=read_sound_clips,
        source="IEMOCAP_full_release, SAIL, University of Southern California",
        licence="of the release: by agreement with USC, for research",
        description=f"IEMOCAP, view {view!r}: {', '.join(classes)}. Test is session {test_session}, dev "
        + (f"session {dev:g}." if dev >= 1 else f"{dev:g} of the other sessions' dialogues."),
        speaker_independent=dev >= 1,
        faults=[replace(fault, split=homes.get(dialogue, "")) for dialogue, fault in release.faults],
    )


def _homes(release: Release, test_session: int, dev: float) -> dict[str, str]:
    """Dialogue -> split. It does not depend on the view, so that the views of one command can be compared."""
    homes = {}
    for session in SESSIONS:
        dialogues = sorted({turn.dialogue for turn in release.turns if turn.session == session})
        # By hash and not by name: names begin with the improvised dialogues.
        drawn = sorted(dialogues, key=lambda name: hashlib.sha256(name.encode()).digest())
        held_out = set(drawn[: max(1, round(dev * len(drawn)))]) if dev < 1 else set(drawn if dev == session else ())
        for dialogue in dialogues:
            homes[dialogue] = "test" if session == test_session else "dev" if dialogue in held_out else "train"
    return homes


# --------------------------------------------------------------------------------------------------------------- files


def _read_session(release: Release, session: int) -> None:
    folder = release.path / f"Session{session}"
    labels = _files(folder / "dialog" / "EmoEvaluation", ".txt")
    if not labels:
        raise UserError(f"{folder / 'dialog' / 'EmoEvaluation'}: no label file Ses0{session}*.txt; unpack it again")
    spoken, wavs = folder / "dialog" / "transcriptions", folder / "sentences" / "wav"
    transcripts: dict[str, str] = {}
    for path in _files(spoken, ".txt"):
        _read_transcript(release, path, transcripts)
    before = len(release.turns)
    for path in labels:
        if not re.fullmatch(rf"Ses0{session}[FM]_\w+", path.stem):
            raise UserError(f"{path}: no dialogue of session {session}; the sessions are mixed up, unpack them again")
        _read_dialogue(release, path, session, transcripts)
    labelled = {turn.name for turn in release.turns[before:]}
    _unlabelled(release, spoken, "transcript", [name for name in transcripts if name not in labelled])
    clips = [path.stem for path in _files(wavs, ".wav", "*/*")]
    _unlabelled(release, wavs, "clip", [name for name in clips if name not in labelled])


def _files(folder: Path, suffix: str, pattern: str = "*") -> list[Path]:
    """Sorted, without what other systems leave behind, such as AppleDouble's `._NAME`."""
    return sorted(path for path in folder.glob(pattern) if path.suffix == suffix and not path.name.startswith("."))


def _text_of(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")  # every byte is a character there


def _read_transcript(release: Release, path: Path, into: dict[str, str]) -> None:
    """Add turn -> text. Lines such as `M: Hm.` belong to no turn."""
    nameless, unknown = 0, 0
    for line in _text_of(path).split("\n"):
        if found := SPOKEN.fullmatch(line.strip()):
            name, text = found.groups()
            if name in into:
                _fault(release, path, name, "transcribed twice", "the first transcript is kept")
            elif text:
                into[name] = text
        elif NAMELESS.match(line):
            nameless += 1
        elif line.strip():
            unknown += 1
    if nameless:
        _fault(release, path, "", f"{nameless} line(s) name a speaker but no turn", "left out")
    if unknown:
        _fault(release, path, "", f"{unknown} line(s) are no transcript", "left out")


def _read_dialogue(release: Release, path: Path, session: int, transcripts: Mapping[str, str]) -> None:
    """Add the turns of one label file."""
    dialogue = path.stem
    wavs = release.path / f"Session{session}" / "sentences" / "wav" / dialogue
    found: dict[str, dict[str, Any]] = {}
    for origin, match, votes in _blocks(path):
        start, end, name, code, *attributes = match.groups()
        if not re.fullmatch(rf"{dialogue}_[FM]\w+", name):
            raise UserError(f"{origin}: turn {name} is of another dialogue; the file is damaged, unpack it again")
        if name in found:
            raise UserError(f"{origin}: turn {name} is labelled a second time; unpack the label file again")
        if code not in LABELS:
            raise UserError(f"{origin}: unknown label {code!r}; known: {', '.join(LABELS)}")
        text, clip = transcripts.get(name), wavs / f"{name}.wav"
        if text is None:
            _fault(release, path, name, "no transcript", "left out")
        if fault := unusable(clip):
            _fault(release, clip, name, fault, "left out")
        found[name] = {
            "start": float(start),
            "end": float(end),
            "code": code,
            "attributes": tuple(float(one) for one in attributes),
            "votes": votes,
            "text": text,
            "clip": None if fault else clip,
            "origin": origin,
        }
    if not found:
        _fault(release, path, "", "no turn in it", "left out")
    ordered = sorted(found, key=lambda name: (found[name]["start"], found[name]["end"], name))
    for number, name in enumerate(ordered):
        release.turns.append(Turn(name=name, dialogue=dialogue, session=session, number=number, **found[name]))


def _blocks(path: Path) -> Iterator[tuple[str, re.Match[str], tuple[str, ...]]]:
    """(where, summary line, votes) of every block of a label file. Blocks are parted by blank lines."""
    where, summary = "", None
    votes: list[str] = []
    for number, line in enumerate([*_text_of(path).split("\n"), ""], 1):
        line = line.strip()
        if not line:
            if summary:
                yield where, summary, tuple(votes)
            where, summary, votes = "", None, []
        elif line.startswith("["):
            where = f"{path} line {number}"
            if summary:
                raise UserError(f"{where}: two summary lines in one block; the label file is damaged, unpack it again")
            summary = SUMMARY.fullmatch(line)
            if not summary:
                raise UserError(f"{where}: not of the form [START - END] TURN LABEL [V, A, D]; unpack the file again")
        elif vote := VOTE.match(line):
            votes += [name.strip()[:3].lower() for name in vote[1].split(";") if name.strip()]


def _unlabelled(release: Release, folder: Path, kind: str, names: Sequence[str]) -> None:
    if names:
        _fault(release, folder, "", f"{len(names)} {kind}(s) of no labelled turn ({some(names)})", "left out")


def _fault(release: Release, path: Path, turn: str, fault: str, done: str) -> None:
    """Note it; `turn` is empty where it concerns no single one."""
    relative = path.relative_to(release.path).as_posix()
    named = f"{turn}: {fault}" if turn and turn not in relative else fault
    release.faults.append((turn.rpartition("_")[0], Fault("", relative, named, done)))
