"""Your own data: dialogues listed in CSV, TSV or JSON-lines tables, with sound files beside them."""

import csv
import difflib
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jointfuse.data.build import CorpusSpec, Row
from jointfuse.data.clips import read_clips
from jointfuse.data.corpora.recordings import with_parts
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
SPLIT_NAMES = {"training": "train", "testing": "test", "evaluation": "test"} | dict.fromkeys(
    ("val", "valid", "validation", "development"), "dev"
)
UNKNOWN_SPEAKER = "unknown"


@dataclass(frozen=True)
class _Line:
    """One row of one table: its cells by the roles of ALIASES, and where it stands."""

    cells: dict[str, str]
    split: str
    folder: Path
    origin: str


def table_corpus(
    tables: Sequence[tuple[str | None, Path]],
    name: str,
    columns: Mapping[str, str | None] | None = None,
    labels: Sequence[str] | None = None,
    source: str = "",
    licence: str = "",
    description: str = "",
    allow_missing: bool = False,
    dialogues_per_table: bool = False,
    times: str = "auto",
) -> CorpusSpec:
    """Read tables into a corpus to build.

    Args:
        tables: (split, path) pairs; split None takes each row's split from the table's split column.
        columns: column name by role (the keys of ALIASES); a role left out is found by its aliases.
        labels: the classes in order; default: those of the training split, sorted.
        allow_missing: take blank text and audio cells (or columns) for utterances without that modality.
        dialogues_per_table: dialogue numbers start again in every split, so equal numbers are different dialogues.
        times: "auto": rows with start and end on a longer recording are cut out of it; "recorded": every clip is cut
            already, and its times are a record only.

    Raises:
        UserError: with table, row and way out, for anything that is not as it should be. Nothing has been written.
    """
    if times not in ("auto", "recorded"):
        raise UserError(f"--times {times}: give auto or recorded")
    lines: list[_Line] = []
    for split, path in tables:
        lines.extend(_read(path, split, columns or {}, allow_missing))
    if labels is None:
        labels = sorted({line.cells["label"] for line in lines if line.split == "train"} - {""})
        if not labels:
            found = ", ".join(sorted({line.split for line in lines})) or "no row at all"
            raise UserError(f"{tables[0][1]}: no training split (`train`) with labels; there is {found}")
    elif len(set(labels)) != len(labels) or "" in labels:
        raise UserError("--labels: a label is blank or given twice; list each class once")
    splits: dict[str, dict[str, list[Row]]] = {}
    for number, line in enumerate(lines):
        dialogues = splits.setdefault(line.split, {})
        dialogue = line.cells.get("dialogue")
        if dialogue == "":
            raise UserError(f"{line.origin}: the dialogue cell is blank; name the dialogue")
        if dialogue is None:
            dialogue = f"{line.split}_{number:06d}"
        elif dialogues_per_table:
            dialogue = f"{line.split}_{dialogue}"
        rows = dialogues.setdefault(dialogue, [])
        rows.append(_row(line, dialogue, len(rows), labels, allow_missing))
    listed = {split: list(dialogues.values()) for split, dialogues in splits.items()}
    return CorpusSpec(
        name=name,
        labels=list(labels),
        splits=with_parts(listed) if times == "auto" else listed,
        render=read_clips,
        source=source,
        licence=licence,
        description=description,
    )


# -------------------------------------------------------------------------------------------------------------- tables


def read_table(path: Path) -> list[tuple[str, dict[str, str]]]:
    """(place for messages, cells by column) of every row of a CSV, TSV or JSON-lines table. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path}: no such table; give the path of a CSV, TSV or JSONL file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save the table as UTF-8") from error
    records = list(_json_lines(path, text) if path.suffix.lower() in (".jsonl", ".ndjson") else csv_rows(path, text))
    if not records:
        raise UserError(f"{path}: the table has no rows; give a header line and one row an utterance")
    return records


def _read(path: Path, split: str | None, columns: Mapping[str, str | None], allow_missing: bool) -> list[_Line]:
    records = read_table(path)
    names = list(dict.fromkeys(name for _, record in records for name in record))
    chosen = _columns(path, names, columns, split is None, allow_missing)
    lines = []
    for origin, record in records:
        cells = {role: record.get(name, "").strip() for role, name in chosen.items()}
        try:
            "".join(cells.values()).encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{origin}: half a character, {error.object[error.start]!r}; mend the text") from error
        home = split or SPLIT_NAMES.get(cells["split"].lower(), cells["split"])
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}", home):
            raise UserError(f"{origin}: {home!r} is no name for a split; use train, dev and test")
        lines.append(_Line(cells, home, path.parent, origin))
    return lines


def csv_rows(path: Path, text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """(origin, cells by column) of the rows of a CSV or TSV table. Row 1 is the header, as a spreadsheet counts.

    Raises:
        UserError: a row has more or fewer cells than the header, or the header a name twice.
    """
    first = text.partition("\n")[0]
    delimiter = "\t" if path.suffix.lower() in (".tsv", ".tab") else ";" if ";" in first and "," not in first else ","
    # Not splitlines: MELD's texts hold characters, such as U+0085, that it takes for line ends.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    number, header = 1, None
    try:
        for number, cells in enumerate(reader, 1):
            if header is None:
                header = [cell.strip() for cell in cells]
                if len(set(header)) != len(header):
                    raise UserError(f"{path} row 1: a column name is there twice; name every column once")
            elif cells:
                if len(cells) != len(header):
                    raise UserError(
                        f"{path} row {number}: {len(cells)} cells under {len(header)} column names; mend it"
                    )
                yield f"{path} row {number}", dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"{path} row {number}: {error}; mend the table") from error


def _json_lines(path: Path, text: str) -> Iterator[tuple[str, dict[str, str]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path} row {number}: not JSON ({error}); give one object a line") from error
        if not isinstance(record, dict):
            raise UserError(f"{path} row {number}: not a JSON object; give one object a line")
        yield f"{path} row {number}", {key: "" if value is None else str(value) for key, value in record.items()}


def _columns(
    path: Path, names: list[str], given: Mapping[str, str | None], need_split: bool, allow_missing: bool
) -> dict[str, str]:
    """Role -> column of this table."""
    plain = {re.sub(r"[\s-]+", "_", name.lower()): name for name in reversed(names)}
    chosen: dict[str, str] = {}
    for role, aliases in ALIASES.items():
        wanted = given.get(role)
        if wanted is not None:
            if wanted not in names:
                raise _no_column(path, role, repr(wanted), names)
            chosen[role] = wanted
        else:
            found = next((plain[alias] for alias in aliases if alias in plain), None)
            if found is not None:
                chosen[role] = found
    needed = ["label"] + (["split"] if need_split else []) + ([] if allow_missing else ["text", "audio"])
    for role in needed:
        if role not in chosen:
            raise _no_column(path, role, " or ".join(ALIASES[role]), names)
    if "text" not in chosen and "audio" not in chosen:
        raise _no_column(path, "text", " or ".join(ALIASES["text"]), names)
    return chosen


def _no_column(path: Path, role: str, sought: str, names: list[str]) -> UserError:
    ways = {
        "split": "or give the tables by --train, --dev and --test",
        "text": "or --allow-missing for a corpus without text",
        "audio": "or --allow-missing for a corpus without sound",
    }
    way = f"set --{role}-column" + (f", {ways[role]}" if role in ways else "")
    return UserError(f"{path}: no column for the {role} (sought {sought}; found {', '.join(names)}); {way}")


# ---------------------------------------------------------------------------------------------------------------- rows


def _row(line: _Line, dialogue: str, position: int, labels: Sequence[str], allow_missing: bool) -> Row:
    cells, origin = line.cells, line.origin
    label = cells["label"]
    if label not in labels:
        near = difflib.get_close_matches(label, labels, 1, 0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(labels)}"
        raise UserError(f"{origin}: unknown label {label!r}; {hint} (--labels sets the list)")
    text, audio = cells.get("text", ""), cells.get("audio", "")
    if not allow_missing:
        for role, value in (("text", text), ("audio", audio)):
            if not value:
                raise UserError(f"{origin}: the {role} cell is blank; fill it, or give --allow-missing")
    elif not text and not audio:
        raise UserError(f"{origin}: neither text nor audio; fill one of the two or delete the row")
    path = line.folder / audio if audio else None
    if path:
        _check_clip(path, origin)
    return Row(
        dialogue=dialogue,
        turn=_turn(cells["turn"], origin) if "turn" in cells else position,
        speaker=cells.get("speaker") or UNKNOWN_SPEAKER,
        label=labels.index(label),
        text=text,
        clip=path,
        identity=audio,
        origin=origin,
        start=seconds_of(cells.get("start", ""), origin),
        end=seconds_of(cells.get("end", ""), origin),
        file=path,
    )


def _check_clip(path: Path, origin: str) -> None:
    if not path.is_file():
        raise UserError(f"{origin}: clip {path} is missing; paths are relative to the table's folder")
    if path.stat().st_size == 0:
        raise UserError(f"{origin}: clip {path} is an empty file; replace it or blank the cell")


def _turn(cell: str, origin: str) -> int:
    try:
        number = float(cell)
        if number == int(number) and 0 <= number < 2**32:
            return int(number)
    except (ValueError, OverflowError):
        pass
    raise UserError(f"{origin}: turn {cell!r} is not a whole number from 0 on; set --turn-column to one that is")


def seconds_of(cell: str, origin: str) -> float | None:
    """Seconds, or MELD's HH:MM:SS,mmm; None for a blank cell. Raises UserError with `origin`, the row."""
    if not cell:
        return None
    try:
        seconds = 0.0
        for part in cell.replace(",", ".").split(":"):
            seconds = seconds * 60 + float(part)
        if math.isfinite(seconds):
            return round(seconds, 6)  # finer than a sample
    except ValueError:
        pass
    raise UserError(f"{origin}: {cell!r} is no time; write seconds or HH:MM:SS.mmm")
