"""Corpora whose file names say it all: a YAML file gives the pattern, the labels, the texts and who is in which split.

ravdess.yaml, nemo.yaml and emodb.yaml beside this file are such descriptions; FileCorpus lists what one may hold. Every
clip is a dialogue of its own.
"""

import difflib
import filecmp
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from jointfuse.data.build import CorpusSpec, Fault, Row
from jointfuse.data.clips import read_sound_clips, words
from jointfuse.data.corpora.table import UNKNOWN_SPEAKER, read_table
from jointfuse.data.soundfiles import header_fault
from jointfuse.errors import UserError
from jointfuse.files import read_yaml

SHIPPED = ("emodb", "nemo", "ravdess")
SUFFIXES = (
    *(".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".aifc", ".au", ".snd", ".w64", ".caf"),
    *(".m4a", ".mp4", ".mov", ".3gp", ".aac", ".ac3", ".mp2", ".amr", ".awb", ".wma", ".webm", ".mka", ".mkv", ".avi"),
)
Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
RESERVED = ("emotion", "dialogue", "turn", "start", "end")  # written by the builder under these names
NAMED = 3  # of many files, so many are named


def _listed(value: Any) -> Any:
    """`01-03` and [`01`, `02-03`] as [`01`, `02`, `03`]."""
    if not isinstance(value, str | list):
        return value
    items = []
    for item in [value] if isinstance(value, str) else value:
        ends = re.fullmatch(r"(\d+)-(\d+)", item) if isinstance(item, str) else None
        if ends:
            width = len(ends[1])
            items += [f"{number:0{width}d}" for number in range(int(ends[1]), int(ends[2]) + 1)]
        else:
            items.append(item)
    return items


Name = Annotated[str, Field(min_length=1)]
Values = Annotated[list[Name], BeforeValidator(_listed), Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Table(_Strict):
    """A CSV or TSV table that lies with the sound files and says more than their names."""

    file: str = Field(description="its path in the folder")
    key: str = Field(description="column of the files' names")
    columns: dict[str, str] = Field(description="label, speaker, text or a name of your own -> column")


class FileCorpus(_Strict):
    """One corpus. All values are strings, so `01` stays `01` without quotes."""

    source: str = ""
    licence: str = ""
    description: str = ""
    pattern: str = Field(description="of a file's name, or of the end of its path: a regular expression, named groups")
    labels: dict[str, Name] = Field(
        min_length=1, description="what the group `label` may be -> class; classes in this order"
    )
    texts: dict[str, str] = Field({}, description="what the group `text` may be -> text; without it, it is the text")
    keep: dict[str, Values] = Field({}, description="group -> its values that are taken; other files are left out")
    table: Table | None = None
    splits: dict[Split, Values] = Field(
        {}, description="speakers of each split, single or as a range such as 01-16; without it, all is train"
    )

    @field_validator("pattern")
    @classmethod
    def _pattern_is_one(cls, pattern: str) -> str:
        try:
            _compiled(pattern)
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from error
        return pattern

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        names = self.names
        if "label" not in names:
            raise ValueError("pattern has no group (?P<label>...), and no table column gives the label")
        for wanted, where in (("speaker", self.splits), ("text", self.texts)):
            if where and wanted not in names:
                raise ValueError(f"pattern has no group (?P<{wanted}>...), and no table column gives the {wanted}")
        for name in self.keep:
            if name not in names:
                raise ValueError(f"keep: {_unknown(name, names)}")
        for name in RESERVED:
            if name in names:
                raise ValueError(f"{name!r} is a name the builder uses; call the group or column something else")
        speakers = [speaker for listed in self.splits.values() for speaker in listed]
        for speaker in speakers:
            if speakers.count(speaker) > 1:
                raise ValueError(f"splits: speaker {speaker!r} is listed twice; a speaker belongs to one split")
        return self

    @property
    def names(self) -> list[str]:
        """Of the pattern's groups and the table's columns."""
        return [*_compiled(self.pattern).groupindex, *(self.table.columns if self.table else ())]


def read_description(path: str | Path) -> FileCorpus:
    """A YAML file, or one of SHIPPED by its name.

    Raises:
        UserError: no such file, no YAML, an unknown entry (its nearest neighbour is named) or a wrong one.
    """
    file = Path(__file__).with_name(f"{path}.yaml") if str(path) in SHIPPED else Path(path)
    way_out = f"give a YAML file with at least pattern and labels, or one of {', '.join(SHIPPED)}"
    tree = read_yaml(file, way_out, strings=True)
    try:
        return FileCorpus.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{file}: {_first_fault(error)}") from error


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
    for clip in _clips(raw, described, left):
        fields = dict(clip.fields)
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
    )


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

    def note(self, paths: Sequence[Path], fault: str) -> None:
        """Add one fault for all of them; none, where there are none."""
        if paths:
            many = f"{len(paths)} files: " if len(paths) > 1 else ""
            self.faults.append(Fault("", some(self._relative(paths)), many + fault, "left out"))

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


def _compiled(pattern: str) -> re.Pattern[str]:
    """For whole paths; group 1 is the part that the pattern describes."""
    return re.compile(f"(?:.*/)?({pattern})")


def _matching(raw: Path, paths: Sequence[Path], pattern: str, left: _Left) -> Iterator[tuple[Path, re.Match[str]]]:
    """The files named as the pattern says, with what was found in their names."""
    hidden, strange = [], []
    compiled = _compiled(pattern)
    for path in paths:
        relative = path.relative_to(raw)
        if any(part.startswith((".", "__MACOSX")) for part in relative.parts):
            hidden.append(path)
        elif match := compiled.fullmatch(relative.as_posix()):
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
        fields = {group: value or "" for group, value in match.groupdict().items()}
        if table is not None:
            key = path.name if path.name in table else path.stem
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
        left.note([raw / described.table.file], f"{len(absent)} row(s) without a file ({some(absent)})")
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
                raise UserError(f"{path}: {_unknown(column, list(cells), 'column')}; mend `table`")
        key = cells[settings.key].strip()
        if key in rows:
            raise UserError(f"{origin}: {key!r} has a row already; keep one of the two")
        rows[key] = {name: cells[column].strip() for name, column in settings.columns.items()}
    return rows


# -------------------------------------------------------------------------------------------------------------- errors


def _looked_up(path: Path, what: str, code: str, known: Mapping[str, str]) -> str:
    if code not in known:
        raise UserError(f"{path}: {what} {code!r} is not among the {what}s described ({', '.join(known)})")
    return known[code]


def _unknown(name: str, known: Sequence[str], what: str = "group") -> str:
    near = difflib.get_close_matches(name, known, 1, 0.5)
    return f"no {what} {name!r}, " + (f"did you mean {near[0]!r}?" if near else f"there is {', '.join(known)}")


def _first_fault(error: ValidationError) -> str:
    # A misspelt entry is also a missing one; its own error says more.
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    place, entry = [str(part) for part in first["loc"]], Table if first["loc"][:1] == ("table",) else FileCorpus
    if first["type"] == "extra_forbidden":
        return _unknown(place[-1], list(entry.model_fields), "entry")
    if first["type"] == "missing":
        return f"the entry {'.'.join(place)} is missing: {entry.model_fields[place[-1]].description}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{'.'.join(place)}: {message}" if place else message
