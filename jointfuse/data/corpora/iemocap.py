"""IEMOCAP as it is distributed: five sessions of two actors, their turns, transcripts, labels and clips.

    Session1/dialog/EmoEvaluation/Ses01F_impro01.txt             one block a turn; its first line is the summary
    Session1/dialog/transcriptions/Ses01F_impro01.txt
    Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav

The letter in a dialogue's name says who wears the markers; the one at the end of a turn's name says who speaks.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jointfuse.data.clips import Clip, read_sound_clips
from jointfuse.data.corpora.files import some, unusable
from jointfuse.data.rows import CorpusSpec, Fault, FaultyClip, Row
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
# View -> code of the label files -> class; turns of other codes have no label. Classes in order of appearance.
VIEWS: dict[str, dict[str, str]] = {
    "six": {code: LABELS[code] for code in ("hap", "sad", "neu", "ang", "exc", "fru")},
    "four": {"ang": "angry", "hap": "happy", "exc": "happy", "sad": "sad", "neu": "neutral"},
    "all": LABELS,
}
SESSIONS = (1, 2, 3, 4, 5)
MOST_MISSING = 0.2  # of a session's transcripts or clips; beyond it, the copy is not whole rather than faulty
LEFT_OUT, HEARD = "left out", "kept as context, without a label"

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
    """All turns of a release, by dialogue and in order, and what was found amiss on the way.

    `missing` is of whole parts, such as a session; a release that is to be whole has none.
    """

    path: Path
    text_only: bool = False
    partial: bool = False
    turns: list[Turn] = field(default_factory=list)
    faults: list[tuple[str, Fault]] = field(default_factory=list)  # with their dialogue, or ""; splits come later
    missing: list[Fault] = field(default_factory=list)

    def count(self, codes: Mapping[str, Any]) -> int:
        return sum(turn.code in codes for turn in self.turns)

    @property
    def codes(self) -> Counter[str]:
        return Counter(turn.code for turn in self.turns)


def read_release(raw: str | Path, text_only: bool = False, partial: bool = False) -> Release:
    """Read the label files and transcripts of IEMOCAP_full_release, or of the folder it lies in, and find the clips.

    Args:
        text_only: without the clips, which need not be there.
        partial: take what is there; whole parts that are not are named.

    Raises:
        UserError: it is no such folder, a part is missing, or a label file is not of the known form.
    """
    path = Path(raw)
    if path.is_file():
        raise UserError(f"{path}: a file; unpack the archive and give the folder IEMOCAP_full_release")
    if (path / "IEMOCAP_full_release").is_dir():
        path = path / "IEMOCAP_full_release"
    if not any((path / f"Session{session}").is_dir() for session in SESSIONS):
        raise UserError(f"{path}: no folder Session1 to Session5; give IEMOCAP_full_release, unpacked")
    release = Release(path, text_only, partial)
    for session in SESSIONS:
        _read_session(release, session)
    if release.missing and not partial:
        parts = "; ".join(f"{fault.file}: {fault.fault}" for fault in release.missing)
        without_clips = all(fault.file.endswith("wav") for fault in release.missing)
        raise UserError(
            f"{path}: not whole ({parts}); unpack it again, or build what is there with --partial"
            + (", or without the clips with --text-only" if without_clips else "")
        )
    return release


def iemocap_corpus(
    release: Release, name: str, view: str = "six", test_session: int = 5, dev: float = 0.1
) -> CorpusSpec:
    """The corpus of one view, one session left out of training as the test split.

    A turn of another label, or without a usable clip, has no label: it is heard before the turns behind it. Of a part
    of a release, a split is there where some turn of it has a label.

    Args:
        view: a key of VIEWS.
        dev: below 1, a share of each remaining session's dialogues, always the same ones: what the field does, but the
            speakers of dev are then those of train; 1 to 5, a session of its own.

    Raises:
        UserError: no such view or session, or nothing of the view in a part of a release.
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
        if turn.text is None:
            continue
        usable = turn.code in VIEWS[view] and (turn.clip is not None or release.text_only)
        row = Row(
            dialogue=turn.dialogue,
            turn=turn.number,
            speaker=turn.speaker,
            label=classes.index(VIEWS[view][turn.code]) if usable else None,
            text=turn.text,
            clip=turn.clip,
            identity=turn.clip.relative_to(release.path).as_posix() if turn.clip else "",
            origin=turn.origin,
            start=turn.start,
            end=turn.end,
            extra=dict(zip(("valence", "arousal", "dominance"), turn.attributes, strict=True)),
            file=turn.clip,
        )
        splits[homes[turn.dialogue]].setdefault(turn.dialogue, []).append(row)
    missing = list(release.missing)
    if release.partial:
        for split in [split for split, dialogues in splits.items() if not _labelled(dialogues.values())]:
            missing.append(Fault(split, "", "no turn is there with a label of the view, text and clip", LEFT_OUT))
            del splits[split]
        if not splits:
            raise UserError(f"{release.path}: nothing to build from: {missing[0].file} {missing[0].fault}")
    return CorpusSpec(
        name=name,
        labels=classes,
        splits={split: list(dialogues.values()) for split, dialogues in splits.items()},
        render=read_turns,
        source="IEMOCAP_full_release, SAIL, University of Southern California",
        licence="of the release: by agreement with USC, for research",
        description=f"IEMOCAP, view {view!r}: {', '.join(classes)}. Test is session {test_session}, dev "
        + (f"session {dev:g}." if dev >= 1 else f"{dev:g} of the other sessions' dialogues.")
        + (" Without the sound." if release.text_only else "")
        + (" Of what was there of the release: `faults` names what was not." if release.partial else ""),
        speaker_independent=dev >= 1,
        faults=[
            *missing,
            *(replace(fault, split=homes.get(dialogue, "")) for dialogue, fault in release.faults),
        ],
    )


def read_turns(rows: Sequence[Row]) -> Iterator[Clip | FaultyClip]:
    """Each turn's clip, at 16 kHz. A turn whose clip is damaged is heard before others, and no more."""
    for clip in read_sound_clips(rows):
        yield replace(clip, kept="context", done=HEARD) if isinstance(clip, FaultyClip) else clip


def _labelled(dialogues: Iterable[Sequence[Row]]) -> bool:
    return any(row.label is not None for rows in dialogues for row in rows)


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
    evaluations = folder / "dialog" / "EmoEvaluation"
    labels = _files(evaluations, ".txt")
    if not labels:
        absent = next((one for one in (folder, evaluations) if not one.is_dir()), None)
        _missing(release, absent or evaluations, "no such folder" if absent else f"no label file Ses0{session}*.txt")
        return
    spoken, wavs = folder / "dialog" / "transcriptions", folder / "sentences" / "wav"
    transcripts: dict[str, str] = {}
    for path in _files(spoken, ".txt"):
        _read_transcript(release, path, transcripts)
    before = len(release.turns)
    for path in labels:
        if not re.fullmatch(rf"Ses0{session}[FM]_\w+", path.stem):
            raise UserError(f"{path}: no dialogue of session {session}; the sessions are mixed up, unpack them again")
        _read_dialogue(release, path, session, transcripts)
    turns = release.turns[before:]
    if not turns:
        _missing(release, evaluations, "no turn in any of its label files")
    labelled = {turn.name for turn in turns}
    _unlabelled(release, spoken, "transcript", [name for name in transcripts if name not in labelled])
    _count_missing(release, spoken, "transcripts", turns, sum(turn.text is None for turn in turns), LEFT_OUT)
    if not release.text_only:
        clips = [path.stem for path in _files(wavs, ".wav", "*/*")]
        _unlabelled(release, wavs, "clip", [name for name in clips if name not in labelled])
        _count_missing(release, wavs, "clips", turns, sum(turn.clip is None for turn in turns), HEARD)


def _count_missing(release: Release, folder: Path, what: str, turns: Sequence[Turn], number: int, treated: str) -> None:
    if number > MOST_MISSING * len(turns):
        absent = "" if folder.is_dir() else "no such folder: "
        fault = f"{absent}{number} of the {what} of {len(turns)} turns are missing or of no use"
        _missing(release, folder, fault, treated)


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
        _fault(release, path, "", f"{nameless} line(s) name a speaker but no turn", LEFT_OUT)
    if unknown:
        _fault(release, path, "", f"{unknown} line(s) are no transcript", LEFT_OUT)


def _read_dialogue(release: Release, path: Path, session: int, transcripts: Mapping[str, str]) -> None:
    """Add the turns of one label file."""
    dialogue = path.stem
    wavs = release.path / f"Session{session}" / "sentences" / "wav"
    found: dict[str, dict[str, Any]] = {}
    for origin, match, votes in _blocks(path):
        start, end, name, code, *attributes = match.groups()
        if not re.fullmatch(rf"{dialogue}_[FM]\w+", name):
            raise UserError(f"{origin}: turn {name} is of another dialogue; the file is damaged, unpack it again")
        if name in found:
            raise UserError(f"{origin}: turn {name} is labelled a second time; unpack the label file again")
        if code not in LABELS:
            raise UserError(f"{origin}: unknown label {code!r}; known: {', '.join(LABELS)}")
        text, clip = transcripts.get(name), wavs / dialogue / f"{name}.wav"
        if text is None and transcripts:
            _fault(release, path, name, "no transcript", LEFT_OUT)
        fault = "not read" if release.text_only else unusable(clip)
        if fault and not release.text_only and wavs.is_dir():
            _fault(release, clip, name, fault, LEFT_OUT if text is None else HEARD)
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
        _fault(release, path, "", "no turn in it", LEFT_OUT)
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
        _fault(release, folder, "", f"{len(names)} {kind}(s) of no labelled turn ({some(names)})", LEFT_OUT)


def _missing(release: Release, path: Path, fault: str, treated: str = "none of its turns is in the corpus") -> None:
    release.missing.append(Fault("", path.relative_to(release.path).as_posix(), fault, treated))


def _fault(release: Release, path: Path, turn: str, fault: str, done: str) -> None:
    """Note it; `turn` is empty where it concerns no single one."""
    relative = path.relative_to(release.path).as_posix()
    named = f"{turn}: {fault}" if turn and turn not in relative else fault
    release.faults.append((turn.rpartition("_")[0], Fault("", relative, named, done)))
