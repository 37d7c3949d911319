"""Tables as they are written: CSV, TSV and JSON Lines to rows of cells, each row as its writer meant it or refused."""

import csv
import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jointfuse.errors import UserError
from jointfuse.files import read_text

Record = tuple[str, dict[str, str]]  # the row's place, for messages; its cells by column
TABS, LINES_OF_JSON = (".tsv", ".tab"), (".jsonl", ".ndjson", ".json")
WELL_QUOTED = "put quotation marks around the whole cell and double those inside it, or save the table as JSON Lines"
SHOWN = 40  # characters of a cell in a message


def read_table(path: Path) -> list[Record]:
    """Every row of a CSV, TSV or JSON Lines table. Raises UserError with the row of what cannot be read."""
    if not path.is_file():
        raise UserError(f"{path}: no such table; give the path of a CSV, TSV or JSONL file")
    text = read_text(path, "save the table as UTF-8").removeprefix("\ufeff").replace("\r\n", "\n")
    records = list(_json_lines(path, text) if path.suffix.lower() in LINES_OF_JSON else csv_rows(path, text))
    if not records:
        raise UserError(f"{path}: the table has no rows; give a header line and one row an utterance")
    return records


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


# ----------------------------------------------------------------------------------------------------------- delimited


def csv_rows(path: Path, text: str) -> Iterator[Record]:
    """The rows of a CSV or TSV table. Row 1 is the header, as a spreadsheet counts.

    CSV is read strictly. In TSV a cell wholly in quotation marks is unquoted, and any other mark is text.

    Raises:
        UserError: a row has more or fewer cells than the header, the header a name twice, or a quotation mark is no
            quote of the format, so that rows would be swallowed.
    """
    first = text.partition("\n")[0]
    tabs = path.suffix.lower() in TABS
    delimiter = "\t" if tabs else ";" if ";" in first and "," not in first else ","
    header: list[str] | None = None
    for number, cells in _tab_separated(path, text) if tabs else _quoted(path, text, delimiter):
        if header is None:
            header = [cell.strip() for cell in cells]
            if len(set(header)) != len(header):
                raise UserError(f"{path} row 1: a column name is there twice; name every column once")
        elif cells:
            _check_row(f"{path} row {number}", cells, len(header), delimiter)
            yield f"{path} row {number}", dict(zip(header, cells, strict=True))


def _check_row(origin: str, cells: Sequence[str], width: int, delimiter: str) -> None:
    if len(cells) != width:
        broken = next((cell for cell in cells if "\n" in cell), None)
        hint = f" (a quotation mark before {broken[:SHOWN]!r} runs over the end of its line)" if broken else ""
        raise UserError(f"{origin}: {len(cells)} cells under {width} column names{hint}; mend it")
    for place, cell in enumerate(cells):
        if "\n" in cell and _may_hold_rows(cell, place, width, delimiter):
            raise UserError(
                f"{origin}: the quotation mark before {cell[:SHOWN]!r} takes in {cell.count(chr(10)) + 1} lines that "
                f"look like rows; {WELL_QUOTED}; a text of several lines goes on one"
            )


def _may_hold_rows(cell: str, place: int, width: int, delimiter: str) -> bool:
    """Whether the lines of a quoted cell would be whole rows, were its quotation marks text.

    They would if the first line fills the row it begins in, the last one the row it ends in, and those between a row
    each. Commas of prose have a space behind them: more of the others than a row needs are no better.
    """
    if width == 1:
        return False
    if delimiter == "\t":
        return delimiter in cell
    first, *between, last = cell.split("\n")
    lines = [first, *[line for line in between if line.strip()], last]
    needed = [width - 1 - place, *[width - 1] * (len(lines) - 2), place]
    close = re.compile(re.escape(delimiter) + r"(?=\S)")
    return [line.count(delimiter) for line in lines] == needed or all(
        len(close.findall(line)) >= count for line, count in zip(lines, needed, strict=True)
    )


def _quoted(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(number, cells) of every row, blank ones too. Raises UserError where a quotation mark is no quote."""
    # Not splitlines: MELD's texts hold characters, such as U+0085, that it takes for line ends.
    lines = list(io.StringIO(text, newline=""))
    reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=True)
    number = 0
    while True:
        number, begin = number + 1, reader.line_num
        try:
            yield number, next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            what = "goes on behind the closing one" if "expected after" in str(error) else "never ends"
            cell = _first_ill_quoted(lines[begin].strip(), delimiter)[:SHOWN]
            raise UserError(
                f"{path} row {number}: a cell begins with a quotation mark and {what} ({cell}); {WELL_QUOTED}"
            ) from error


def _first_ill_quoted(line: str, delimiter: str) -> str:
    """The rest of a line behind its cells that are well quoted or not quoted."""
    mark = re.escape(delimiter)
    good = re.compile(rf' *+(?:"(?:[^"]|"")*"|[^"{mark}][^{mark}]*|){mark}')
    begin = 0
    while cell := good.match(line, begin):
        begin = cell.end()
    return line[begin:].strip()


def _tab_separated(path: Path, text: str) -> list[tuple[int, list[str]]]:
    """(number, cells) of every row, blank ones too.

    A line is a row wherever that fits. Where it does not, cells in quotation marks hold tabs or line ends, as pandas
    and Excel write them. Where both fit and differ, csv_rows refuses the row that would swallow others.
    """
    lines = [line.rstrip("\r\n") for line in io.StringIO(text, newline="")]
    by_line = [
        (number, [_unquoted(cell) for cell in line.split("\t")] if line else []) for number, line in enumerate(lines, 1)
    ]
    try:
        quoted = list(_quoted(path, text, "\t"))
    except UserError:
        return by_line
    return quoted if _fits(quoted) or not _fits(by_line) else by_line


def _unquoted(cell: str) -> str:
    whole = re.fullmatch(r'"((?:[^"]|"")*)"', cell)
    return whole[1].replace('""', '"') if whole else cell


def _fits(rows: Sequence[tuple[int, list[str]]]) -> bool:
    """Whether every row has as many cells as the header."""
    return all(len(cells) in (0, len(rows[0][1])) for _, cells in rows)


# ---------------------------------------------------------------------------------------------------------- JSON Lines


def _json_lines(path: Path, text: str) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        origin = f"{path} row {number}"
        try:
            record = json.loads(line, object_pairs_hook=_every_key_once)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{origin}: not JSON ({error}); give one object a line") from error
        if not isinstance(record, dict):
            raise UserError(f"{origin}: not a JSON object; give one object a line")
        yield origin, {name: _json_cell(value, name, origin) for name, value in record.items()}


def _every_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice!r} is given twice")
    return dict(pairs)


def _json_cell(value: Any, name: str, origin: str) -> str:
    if value is None or value != value:  # NaN, as pandas writes null
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        kind = {bool: "true or false", list: "a list", dict: "an object", float: "no finite number"}[type(value)]
        raise UserError(f"{origin}: column {name!r} holds {kind}; give a string, a number or null")
    return str(value)
