"""Your own data: dialogues listed in CSV, TSV or JSON Lines tables, with sound files beside them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from jointfuse.data.clips import read_clips
from jointfuse.data.corpora.cells import seconds_of
from jointfuse.data.corpora.labels import (
    check_labels,
    check_one_label,
    class_number,
    classes_of,
    given_classes,
    lost_votes,
    tied_votes,
    votes_of,
)
from jointfuse.data.corpora.parts import Line, describe_parts, read_parts
from jointfuse.data.corpora.recordings import with_parts
from jointfuse.data.rows import CorpusSpec, Fault, Row
from jointfuse.errors import UserError

UNKNOWN_SPEAKER = "unknown"


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
    unlabelled: bool = False,
    votes: str | None = None,
    times: str = "auto",
) -> CorpusSpec:
    """Read tables into a corpus to build.

    Args:
        tables: (split, path) pairs; split None takes each row's split from the table's split column.
        columns: column name by part (the keys of ALIASES); a part left out is found by its aliases.
        labels: the classes in order; default: those of the training split, or of all where there is none, sorted.
        allow_missing: take blank text and audio cells (or columns) for utterances without that modality.
        dialogues_per_table: dialogue numbers start again in every split, so equal numbers are different dialogues.
        unlabelled: take rows with a blank label for turns that are heard before others, and no more.
        votes: "majority": the rows of one clip are its raters' votes; it gets the label most of them gave.
        times: "auto": rows with start and end on a longer recording are cut out of it; "recorded": every clip is cut
            already, and its times are a record only.

    Raises:
        UserError: with table, row and way out, for anything that is not as it should be. Nothing has been written.
    """
    if votes not in (None, "majority"):
        raise UserError(f"--votes {votes}: there is only `majority`")
    if times not in ("auto", "recorded"):
        raise UserError(f"--times {times}: give auto or recorded")
    read = [read_parts(path, split, columns or {}, allow_missing) for split, path in tables]
    lines = [line for table in read for line in table.lines]
    rows = {split: {"read": count} for split, count in Counter(line.split for line in lines).items()}
    given = given_classes(labels) if labels is not None else None
    check_labels(lines, given, unlabelled)
    faults: list[Fault] = []
    if votes:
        every = votes_of(lines)
        lines, faults = [line for poll in every if (line := poll.elected)], tied_votes(every)
        for split in rows.keys() - {line.split for line in lines}:
            raise UserError(f"{tables[0][1]}: every vote of split {split!r} is tied; leave it out or add votes")
        rows = {split: counts | lost_votes(every).get(split, {}) for split, counts in rows.items()}
    else:
        check_one_label(lines)
    classes = given or classes_of(lines)
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
        turns = dialogues.setdefault(dialogue, [])
        turns.append(_row(line, dialogue, len(turns), classes, allow_missing))
    listed = {split: list(dialogues.values()) for split, dialogues in splits.items()}
    return CorpusSpec(
        name=name,
        labels=classes,
        splits=with_parts(listed) if times == "auto" else listed,
        render=read_clips,
        source=source,
        licence=licence,
        description=description,
        faults=faults,
        rows=rows,
        notes=describe_parts(read),
    )


def _row(line: Line, dialogue: str, position: int, labels: Sequence[str], allow_missing: bool) -> Row:
    cells, origin = line.cells, line.origin
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
        label=class_number(line, labels),
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
