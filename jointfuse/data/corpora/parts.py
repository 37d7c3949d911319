"""Which column of a table plays which part, and its rows by these parts."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jointfuse.data.corpora.cells import read_table
from jointfuse.data.corpora.names import known_split, plain_name, plain_text, split_name
from jointfuse.errors import UserError

# What a column may be called when no option names it; upper and lower case, spaces and dashes do not matter.
ALIASES = {
    "text": ("text", "utterance", "transcript", "transcription", "sentence"),
    "label": ("emotion", "label", "class", "category"),
    "audio": ("audio", "audio_path", "path", "file", "filename", "wav", "clip"),
    "speaker": ("speaker", "speaker_id", "spk"),
    "dialogue": ("dialogue_id", "dialogue", "dialog_id", "dialog", "conversation_id", "conversation", "dia_id"),
    "turn": ("turn", "turn_id", "utterance_id", "utt_id"),
    "split": ("split", "subset", "partition"),
    "start": ("start", "start_time", "starttime"),
    "end": ("end", "end_time", "endtime"),
}
NAMES = ("label", "speaker", "dialogue", "split")
# What programs write for a value that is not there.
NO_VALUE = ("nan", "NaN", "NAN", "None", "NA", "N/A", "n/a", "#N/A", "<NA>", "null", "NULL")


@dataclass(frozen=True)
class Line:
    """One row of one table: its cells by the parts of ALIASES, and where it stands."""

    cells: dict[str, str]
    split: str
    folder: Path
    origin: str


@dataclass(frozen=True)
class Table:
    """The rows of one table, and what its columns were taken for."""

    path: Path
    lines: list[Line]
    parts: dict[str, str]  # part -> column
    unused: list[str]  # columns


def read_parts(path: Path, split: str | None, columns: Mapping[str, str | None], allow_missing: bool) -> Table:
    """Read a table.

    Args:
        split: of every row; None: each row's own, from the column of the splits.
        columns: part -> column; a part that is left out, or None, is found by its aliases.
        allow_missing: a table without text, or without audio, will do.

    Raises:
        UserError: with table, row and way out, for anything that is not as it should be.
    """
    records = read_table(path)
    names = list(dict.fromkeys(name for _, record in records for name in record))
    parts = _choose(path, names, columns)
    _check_needed(path, names, parts, split is None, allow_missing)
    lines = []
    for origin, record in records:
        cells = {part: _cell(part, record.get(name, "")) for part, name in parts.items()}
        try:
            "".join(cells.values()).encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{origin}: half a character, {error.object[error.start]!r}; mend the text") from error
        for part in ("speaker", "dialogue"):
            if cells.get(part) in NO_VALUE:
                raise UserError(f"{origin}: the {part} cell is {cells[part]!r}, no value; name the {part} or blank it")
        home = _home(cells, split, origin)
        lines.append(Line(cells, home, path.parent, origin))
    return Table(path, lines, parts, [name for name in names if name not in parts.values()])


def describe_parts(tables: Sequence[Table]) -> list[str]:
    """Lines that say which column plays which part; for each table, where they differ."""
    lines = []
    alike = all((table.parts, table.unused) == (tables[0].parts, tables[0].unused) for table in tables)
    for table in tables[:1] if alike else tables:
        place = "" if alike else f"{table.path}: "
        lines += [f"{place}{part}: column {name!r}" for part, name in table.parts.items()]
        if table.unused:
            lines.append(f"{place}not used: {', '.join(map(repr, table.unused))}")
    return lines


def _cell(part: str, cell: str) -> str:
    return plain_name(cell) if part in NAMES else plain_text(cell) if part == "text" else cell.strip()


def _home(cells: Mapping[str, str], split: str | None, origin: str) -> str:
    if split is None:
        return split_name(cells["split"], origin)
    own = known_split(cells.get("split", ""))
    if own not in (None, split):
        raise UserError(
            f"{origin}: its split is {cells['split']!r}, the table was given as --{split}; "
            "give the table without an option, or take its split column out"
        )
    return split


def _choose(path: Path, names: Sequence[str], given: Mapping[str, str | None]) -> dict[str, str]:
    """Part -> column of this table."""
    chosen = {part: name for part in ALIASES if (name := given.get(part)) is not None}
    for part, name in chosen.items():
        if name not in names:
            raise _no_column(path, part, repr(name), names)
    free = [(re.sub(r"[\s-]+", "_", plain_name(name).lower()), name) for name in names if name not in chosen.values()]
    for part, aliases in ALIASES.items():
        if part in chosen:
            continue
        fitting = [name for plain, name in free if plain in aliases]
        if len(fitting) > 1:
            raise UserError(
                f"{path}: {' and '.join(map(repr, fitting))} could each be the {part}; say which by --{part}-column"
            )
        if fitting:
            chosen[part] = fitting[0]
    return {part: chosen[part] for part in ALIASES if part in chosen}


def _check_needed(
    path: Path, names: Sequence[str], parts: Mapping[str, str], need_split: bool, allow_missing: bool
) -> None:
    needed = ["label"] + (["split"] if need_split else []) + ([] if allow_missing else ["text", "audio"])
    for part in needed:
        if part not in parts:
            raise _no_column(path, part, " or ".join(ALIASES[part]), names)
    if "text" not in parts and "audio" not in parts:
        raise _no_column(path, "text", " or ".join(ALIASES["text"]), names)


def _no_column(path: Path, part: str, sought: str, names: Sequence[str]) -> UserError:
    ways = {
        "split": "or give the tables by --train, --dev and --test",
        "text": "or --allow-missing for a corpus without text",
        "audio": "or --allow-missing for a corpus without sound",
    }
    way = f"set --{part}-column" + (f", {ways[part]}" if part in ways else "")
    return UserError(f"{path}: no column for the {part} (sought {sought}; found {', '.join(names)}); {way}")
