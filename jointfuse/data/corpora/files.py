"""Corpora whose file names say it all, from a folder of sound files and a description. Every clip is a dialogue."""

import filecmp
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jointfuse.data.clips import read_sound_clips, words
from jointfuse.data.corpora.cells import read_table
from jointfuse.data.corpora.descriptions import SPLITS, FileCorpus, Table, compiled, unknown
from jointfuse.data.corpora.names import plain_name, plain_text
from jointfuse.data.corpora.table import UNKNOWN_SPEAKER
from jointfuse.data.rows import CorpusSpec, Fault, Row
from jointfuse.data.soundfiles import header_fault
from jointfuse.errors import UserError

SUFFIXES = (
    *(".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".aifc", ".au", ".snd", ".w64", ".caf"),
    *(".m4a", ".mp4", ".mov", ".3gp", ".aac", ".ac3", ".mp2", ".amr", ".awb", ".wma", ".webm", ".mka", ".mkv", ".avi"),
)
NAMED = 3  # of many files, so many are named


def files_corpus(raw: str | Path, described: FileCorpus, name: str) -> CorpusSpec:
    """The corpus of the sound files under `raw`, at any depth.

    Raises:
        UserError: nothing fits, two different files have one name, or a label, text or speaker is not described.
    """
    raw = Path(raw)
    left = _Left(raw)
    home = {speaker: split for split, speakers in described.splits.items() for speaker in speakers}
    classes = list(dict.fromkeys(described.labels.values()))
    splits: dict[str, list[list[Row]]] = {split: [] for split in SPLITS if split in described.splits} or {"train": []}
    seen: dict[str, set[str]] = {"label": set(), "text": set(), "speaker": set()}
    for clip in _clips(raw, described, left):
        fields = dict(clip.fields)
        for part, values in seen.items():
            values.add(fields.get(part, ""))
        speaker = fields.pop("speaker", UNKNOWN_SPEAKER)
        if home and speaker not in home:
            raise UserError(f"{clip.path}: speaker {speaker!r} is in no split; add it to one under `splits`")
        label = _looked_up(clip.path, "label", fields.pop("label"), described.labels)
        text = fields.pop("text", "")
        row = Row(
            dialogue=clip.name,
            turn=0,
            speaker=speaker,
            label=classes.index(label),
            text=_looked_up(clip.path, "text", text, described.texts) if described.texts else text,
            clip=clip.path,
            identity=clip.name + clip.path.suffix,
            origin=clip.path.relative_to(raw).as_posix(),
            extra=fields,
            file=clip.path,
        )
        splits[home.get(speaker, "train")].append([row])
    return CorpusSpec(
        name=name,
        labels=classes,
        splits=splits,
        render=read_sound_clips,
        source=described.source,
        licence=described.licence,
        description=described.description,
        speaker_independent=bool(described.splits),
        faults=left.faults,
        rows={split: {"read": len(clips)} for split, clips in splits.items()} | left.rows(),
        notes=[
            note
            for entry, described_names, part in (
                ("labels", described.labels, "label"),
                ("texts", described.texts, "text"),
                ("splits", home, "speaker"),
            )
            for note in _unmet(entry, described_names, seen[part])
        ],
    )


def _unmet(entry: str, described: Iterable[str], seen: set[str]) -> Iterator[str]:
    names = [name for name in described if name not in seen]
    if names:
        yield f"{entry}: no file is of {some(names)}"


# --------------------------------------------------------------------------------------------------------------- clips


@dataclass(frozen=True)
class _Clip:
    path: Path
    name: str  # the part of the path that the pattern matches, without its suffix
    fields: dict[str, str]


class _Left:
    """What is left out of a corpus, as faults."""

    def __init__(self, raw: Path) -> None:
        self._raw = raw
        self.faults: list[Fault] = []
        self._files: Counter[str] = Counter()

    def note(self, paths: Sequence[Path], fault: str, sound: bool = True) -> None:
        """Add one fault for all of them; none, where there are none. `sound`: they are sound files."""
        if paths:
            self._files[fault] += len(paths) * sound
            many = f"{len(paths)} files: " if len(paths) > 1 else ""
            self.faults.append(Fault("", some(self._relative(paths)), many + fault, "left out"))

    def rows(self) -> dict[str, dict[str, int]]:
        """The sound files that are in no split, for CorpusSpec."""
        lost = {fault: count for fault, count in self._files.items() if count}
        return {"": {"read": sum(lost.values()), **lost}} if lost else {}

    def _relative(self, paths: Sequence[Path]) -> list[str]:
        return [path.relative_to(self._raw).as_posix() for path in paths]


def some(names: Sequence[str]) -> str:
    """The first few."""
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def unusable(path: Path) -> str | None:
    """Why a sound file cannot be used, as far as its size and header say; None if they say nothing against it."""
    if not path.is_file():
        return "no clip"
    if path.stat().st_size == 0:
        return "an empty file"
    try:
        return header_fault(path)
    except OSError as error:
        return words(error)


def _sound_files(raw: Path) -> list[Path]:
    if not raw.is_dir():
        raise UserError(
            f"{raw}: {'a file; unpack it and give' if raw.is_file() else 'no such folder; give'} the folder"
        )
    paths = sorted(path for path in raw.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        packed = sorted(path.name for path in raw.iterdir() if path.suffix in (".zip", ".gz", ".tar"))
        way = f"unpack {packed[0]} first" if packed else "give the folder of the unpacked corpus"
        raise UserError(f"{raw}: no sound file ({', '.join(SUFFIXES)}) in it; {way}")
    return paths


def _matching(raw: Path, paths: Sequence[Path], pattern: str, left: _Left) -> Iterator[tuple[Path, re.Match[str]]]:
    """The files named as the pattern says, with what was found in their names."""
    hidden, strange = [], []
    described = compiled(pattern)
    for path in paths:
        relative = path.relative_to(raw)
        if any(part.startswith((".", "__MACOSX")) for part in relative.parts):
            hidden.append(path)
        elif match := described.fullmatch(unicodedata.normalize("NFC", relative.as_posix())):
            yield path, match
        else:
            strange.append(path)
    if len(hidden) + len(strange) == len(paths):
        names = some([path.relative_to(raw).as_posix() for path in strange or hidden])
        raise UserError(
            f"{raw}: none of its {len(paths)} sound files is named as the pattern {pattern} says ({names}); "
            "is it another corpus?"
        )
    left.note(hidden, "left behind by another system")
    left.note(strange, "named otherwise than the pattern says")


def _clips(raw: Path, described: FileCorpus, left: _Left) -> Iterator[_Clip]:
    """The clips that the description takes, sorted by path; the rest is noted in `left`."""
    paths, table = _sound_files(raw), _table(raw, described.table)
    unlisted: list[Path] = []
    copies: list[Path] = []
    unwanted: dict[str, list[Path]] = {}
    taken: dict[str, Path] = {}
    listed = set()
    for path, match in _matching(raw, paths, described.pattern, left):
        fields = {name: _field(name, value or "") for name, value in match.groupdict().items()}
        if table is not None:
            file = unicodedata.normalize("NFC", path.name)
            key = file if file in table else file.removesuffix(path.suffix)
            if key not in table:
                unlisted.append(path)
                continue
            listed.add(key)
            fields |= table[key]
        wrong = next((group for group, kept in described.keep.items() if fields[group] not in kept), None)
        name = match[1].removesuffix(path.suffix)
        if wrong:
            unwanted.setdefault(f"{wrong} {fields[wrong]} is not kept", []).append(path)
        elif fault := unusable(path):
            left.note([path], fault)
        elif name not in taken:
            taken[name] = path
            yield _Clip(path, name, fields)
        elif filecmp.cmp(taken[name], path, shallow=False):
            copies.append(path)
        else:
            raise UserError(f"{path}: has the name of {taken[name]} but other content; keep one of the two")
    for why, files in unwanted.items():
        left.note(files, why)
    left.note(copies, "copied from elsewhere in the folder")
    left.note(unlisted, "not in the table")
    if table is not None and described.table and (absent := sorted(set(table) - listed)):
        left.note([raw / described.table.file], f"{len(absent)} row(s) without a file ({some(absent)})", sound=False)
    if not taken:
        raise UserError(f"{raw}: nothing is left to build from: {left.faults[0].fault}")


def _table(raw: Path, settings: Table | None) -> dict[str, dict[str, str]] | None:
    """File name -> field -> cell."""
    if settings is None:
        return None
    path = raw / settings.file
    rows: dict[str, dict[str, str]] = {}
    for origin, cells in read_table(path):
        for column in (settings.key, *settings.columns.values()):
            if column not in cells:
                raise UserError(f"{path}: {unknown(column, list(cells), 'column')}; mend `table`")
        key = unicodedata.normalize("NFC", cells[settings.key].strip())
        if key in rows:
            raise UserError(f"{origin}: {key!r} has a row already; keep one of the two")
        rows[key] = {name: _field(name, cells[column]) for name, column in settings.columns.items()}
    return rows


def _field(name: str, value: str) -> str:
    return plain_name(value) if name in ("label", "speaker") else plain_text(value)


def _looked_up(path: Path, what: str, code: str, known: Mapping[str, str]) -> str:
    if code not in known:
        raise UserError(f"{path}: {what} {code!r} is not among the {what}s described ({', '.join(known)})")
    return known[code]
