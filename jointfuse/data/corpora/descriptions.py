"""Descriptions of corpora whose file names say it all, as ravdess.yaml, nemo.yaml and emodb.yaml beside this file.

FileCorpus lists what one may hold.
"""

import difflib
import re
import unicodedata
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from jointfuse.data.corpora.labels import check_case
from jointfuse.errors import UserError
from jointfuse.files import parse_yaml, read_text, read_yaml

SHIPPED = ("emodb", "nemo", "ravdess")
Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
LONGEST_RANGE = 100_000
RESERVED = ("emotion", "dialogue", "turn", "start", "end")  # written by the builder under these names


def _listed(value: Any) -> Any:
    """`01-03` and [`01`, `02-03`] as [`01`, `02`, `03`]; `SM1-SM3, SF1` as [`SM1`, `SM2`, `SM3`, `SF1`]."""
    if isinstance(value, str):
        value = [item.strip() for item in value.split(",")]
    if not isinstance(value, list):
        return value
    return [one for item in value for one in (_range(item) if isinstance(item, str) else [item])]


def _range(item: str) -> list[str]:
    """The names from one number to the other, as wide as the first is written; any other name alone."""
    ends = re.fullmatch(r"(.*?)(\d+)-\1(\d+)", item)
    if not ends:
        return [item]
    prefix, first, last = ends.groups()
    if int(first) > int(last):
        raise ValueError(f"the range {item!r} runs backwards; write {prefix}{last}-{prefix}{first}")
    if int(last) - int(first) >= LONGEST_RANGE:
        raise ValueError(f"the range {item!r} has more than {LONGEST_RANGE} names; give a shorter one")
    return [f"{prefix}{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]


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
        {},
        description="speakers of each split, single or as a range such as 01-16 or SM1-SM5; without it, all is train",
    )

    @field_validator("pattern")
    @classmethod
    def _pattern_is_one(cls, pattern: str) -> str:
        try:
            compiled(pattern)
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
                raise ValueError(f"keep: {unknown(name, names)}")
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
        return [*compiled(self.pattern).groupindex, *(self.table.columns if self.table else ())]


def read_description(path: str | Path) -> FileCorpus:
    """A YAML file, or one of SHIPPED by its name.

    Raises:
        UserError: no such file, no YAML, an unknown entry (its nearest neighbour is named) or a wrong one.
    """
    file = Path(__file__).with_name(f"{path}.yaml") if str(path) in SHIPPED else Path(path)
    way_out = f"give a YAML file with at least pattern and labels, or one of {', '.join(SHIPPED)}"
    tree = _composed(_read(file, way_out))
    _check_texts(file, tree.get("texts"))
    try:
        described = FileCorpus.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{file}: {_first_fault(error)}") from error
    check_case((label, f"{file}: labels") for label in described.labels.values())
    return described


def compiled(pattern: str) -> re.Pattern[str]:
    """For whole paths; group 1 is the part that the pattern describes."""
    return re.compile(f"(?:.*/)?({pattern})")


def unknown(name: str, known: Sequence[str], what: str = "group") -> str:
    """What a message says of a name that is not known: the nearest one, or all there are."""
    near = difflib.get_close_matches(name, known, 1, 0.5)
    return f"no {what} {name!r}, " + (f"did you mean {near[0]!r}?" if near else f"there is {', '.join(known)}")


# ----------------------------------------------------------------------------------------------------------------- YAML


def _composed(value: Any) -> Any:
    """A tree whose strings are in Unicode's composed form, as the file names will be."""
    if isinstance(value, dict):
        return {_composed(key): _composed(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_composed(inner) for inner in value]
    return unicodedata.normalize("NFC", value) if isinstance(value, str) else value


def _read(file: Path, way_out: str) -> dict[str, Any]:
    """The mapping in a YAML file; where it breaks at a text without quotes, the message shows the line mended."""
    try:
        return read_yaml(file, way_out, strings=True)
    except UserError as error:
        fault = error.__cause__
        if not isinstance(fault, yaml.MarkedYAMLError) or fault.problem_mark is None:
            raise
        # A quotation mark that is never closed breaks at the end of the file; what matters is where it stands.
        opened = fault.context_mark if "quoted" in (fault.context or "") else None
        mark = opened or fault.problem_mark
        mended = _mended(read_text(file, way_out), mark.line, mark.column)
        if mended is None:
            raise
        place = f"{file} line {mark.line + 1}"
        raise UserError(f"{place}: not valid YAML ({fault.problem}); quote it: {mended}") from error


def _mended(text: str, number: int, column: int) -> str | None:
    """`key: "text"` of the entry at a place that breaks; None, where quotes would not mend it."""
    lines = text.split("\n")
    line = lines[number] if number < len(lines) else ""
    entries = list(re.finditer(r"(?:^|[{,])\s*(?:- )?([\w.-]+):\s+", line))
    here = next((place for place in reversed(range(len(entries))) if entries[place].end() <= column), None)
    if here is None:
        return None
    begin = entries[here].end()
    end = entries[here + 1].start() if here + 1 < len(entries) else len(line.rstrip())
    # The last text of a line may end with the comma or the brace of the mapping it stands in.
    for cut in [end - 1, end] if here + 1 == len(entries) and line[end - 1] in ",}" else [end]:
        value = _in_quotes(line[begin:cut].strip())
        after = "\n".join([*lines[:number], line[:begin] + value + line[cut:], *lines[number + 1 :]])
        if _breaks_behind(after, number, begin + len(value)):
            return f"{entries[here][1]}: {value}"
    return None


def _breaks_behind(text: str, line: int, column: int) -> bool:
    """Whether YAML can be read up to a place at least."""
    try:
        parse_yaml(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        return mark is not None and (mark.line, mark.column) > (line, column)
    except ValueError:  # a number or a date that is none: its place says nothing of the text
        pass
    return True


def _in_quotes(text: str) -> str:
    """A text as YAML takes it whatever it holds."""
    return "'" + text.replace("'", "''") + "'" if set(text) & set('"\\') else f'"{text}"'


def _check_texts(file: Path, texts: Any) -> None:
    """Refuse texts that YAML cut short: at a comma in braces, or at a # that it takes for a comment."""
    if not isinstance(texts, dict):
        return
    written = unicodedata.normalize("NFC", read_text(file, "give a YAML file"))
    codes = list(texts)
    for place, code in enumerate(codes):
        text = texts[code]
        if not isinstance(text, str):
            continue
        if not text and not re.search(rf"""(?<!\w){re.escape(code)}['"]?\s*:\s*(""|'')""", written):
            rest = takewhile(lambda one: not texts[one], codes[place:])
            before = codes[place - 1] if place else ""
            cut = f"{before}: {_in_quotes(', '.join([texts[before], *rest]))}" if before else f'{code}: "..."'
            raise UserError(f"{file}: texts: {code!r} has no text; a comma ends a text in braces; quote it: {cut}")
        comment = re.search(rf"""(?<!\w){re.escape(code)}['"]?:\s+({re.escape(text)}\s+#\S.*)""", written)
        if text and comment:
            cut = f"{code}: {_in_quotes(comment[1].strip())}"
            raise UserError(f"{file}: texts: {text!r} ends before a #, a comment to YAML; quote it: {cut}")


# --------------------------------------------------------------------------------------------------------------- errors


def _first_fault(error: ValidationError) -> str:
    # A misspelt entry is also a missing one; its own error says more.
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    place, entry = [str(part) for part in first["loc"]], Table if first["loc"][:1] == ("table",) else FileCorpus
    if first["type"] == "extra_forbidden":
        return unknown(place[-1], list(entry.model_fields), "entry")
    if first["type"] == "missing":
        return f"the entry {'.'.join(place)} is missing: {entry.model_fields[place[-1]].description}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{'.'.join(place)}: {message}" if place else message
