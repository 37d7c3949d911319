"""Rows whose start and end are times in their own file: which of them are parts of a recording."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from jointfuse.data.clips import Part
from jointfuse.data.rows import Row
from jointfuse.errors import UserError

Splits = dict[str, list[list[Row]]]


def with_parts(splits: Splits) -> Splits:
    """The rows of a corpus, those with both times told that they may be parts of their file.

    Whether they are is known once the file has been heard: one as long as its row says is a clip that was cut already.

    Raises:
        UserError: times that run backwards, or one time alone of a file that several rows name.
    """
    of_file: dict[Path, list[Row]] = {}
    for row in _rows(splits):
        if row.file is not None:
            of_file.setdefault(_plain(row.file), []).append(row)
    shared, overlapping = set(), set()
    for path, rows in of_file.items():
        for row in rows:
            _check(row, len(rows))
        timed = [row for row in rows if _has_times(row)]
        if len({(row.start, row.end) for row in timed}) > 1:
            shared.add(path)
            overlapping |= set(_overlapping(timed))
    return {
        split: [[_with_part(row, shared, id(row) in overlapping) for row in dialogue] for dialogue in dialogues]
        for split, dialogues in splits.items()
    }


def _rows(splits: Splits) -> Iterator[Row]:
    return (row for dialogues in splits.values() for dialogue in dialogues for row in dialogue)


def _plain(path: Path) -> Path:
    """The one name of a file, whichever way leads to it."""
    return path.resolve() if ".." in path.parts else path


def _has_times(row: Row) -> bool:
    return row.start is not None and row.end is not None


def _check(row: Row, rows: int) -> None:
    """Refuse times that can be no part of any file; `rows`: so many name this one."""
    if row.start is not None and row.end is not None:
        if row.end <= row.start or row.start < 0:
            raise UserError(
                f"{row.origin}: {row.file} from {row.start:g} to {row.end:g} s is no part of it; mend the times, or, "
                "if the clips are cut already, give --times recorded"
            )
    elif (row.start is not None or row.end is not None) and rows > 1:
        raise UserError(
            f"{row.origin}: {rows} rows name {row.file}, and this one has only "
            f"{'a start' if row.end is None else 'an end'}; give both, or, if the clips are cut already, "
            "--times recorded"
        )


def _overlapping(rows: Sequence[Row]) -> Iterator[int]:
    """The ids of rows of one recording during which another row has begun or has not ended."""
    furthest: Row | None = None
    for row in sorted(rows, key=lambda row: (row.start, row.end)):
        if furthest is not None and furthest.end is not None and row.start is not None and row.start < furthest.end:
            yield id(row)
            yield id(furthest)
        if furthest is None or (furthest.end is not None and row.end is not None and row.end > furthest.end):
            furthest = row


def _with_part(row: Row, shared: set[Path], overlaps: bool) -> Row:
    if row.file is None or row.start is None or row.end is None:
        return row
    path = _plain(row.file)
    part = Part(path, row.start, row.end, path in shared, overlaps)
    return replace(row, clip=part, identity=f"{row.identity} part {part.shared:d}{overlaps:d}")
