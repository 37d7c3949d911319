"""The classes of a table's labels, and the vote where a clip has a row a rater."""

import difflib
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from jointfuse.data.corpora.cells import seconds_of
from jointfuse.data.corpora.names import plain_name
from jointfuse.data.corpora.parts import NO_VALUE, Line
from jointfuse.data.rows import Fault
from jointfuse.errors import UserError

# More classes than that are no classes: a third of the rows from so many rows on, a tenth from so many classes on.
MANY_ROWS, MANY_CLASSES = 30, 20
FRACTION = re.compile(r"[+-]?\d*[.,]\d+(e[+-]?\d+)?", re.IGNORECASE)
AGREEING = ("text", "speaker", "dialogue", "turn")  # parts in which the rows of one utterance are the same
NAMED = 3  # of many clips, so many are named
FURTHER_VOTES, TIED_VOTES = "further votes on an utterance", "votes that were tied"


@dataclass(frozen=True)
class Poll:
    """One utterance and the rows that rate it."""

    lines: list[Line]

    @property
    def elected(self) -> Line | None:
        """The first row, with the label that most rows gave; None: two labels share the first place."""
        (label, votes), *others = Counter(line.cells["label"] for line in self.lines).most_common(2)
        first = self.lines[0]
        return None if others and others[0][1] == votes else replace(first, cells=first.cells | {"label": label})


# -------------------------------------------------------------------------------------------------------------- classes


def given_classes(labels: Sequence[str]) -> list[str]:
    """The classes of --labels, in its order. Raises UserError where one is blank or there twice, in any case."""
    classes = [plain_name(label) for label in labels]
    if len(set(classes)) != len(classes) or "" in classes:
        raise UserError("--labels: a label is blank or given twice; list each class once")
    check_case((label, "--labels") for label in classes)
    return classes


def check_labels(lines: Sequence[Line], given: Sequence[str] | None, unlabelled: bool) -> None:
    """Refuse labels that are blank, stand for no value, differ by case alone, or are no name of a class.

    Args:
        given: classes that were listed, and are therefore meant, whatever they look like.
        unlabelled: a blank label is meant as well.

    Raises:
        UserError: with the row and the way out.
    """
    first = {line.cells["label"]: line.origin for line in reversed(lines)}
    for label, origin in first.items():
        if not label and not unlabelled:
            raise UserError(f"{origin}: the label cell is blank; fill it, or give --unlabelled context: heard, no more")
        if given is not None or not label:
            continue
        if label in NO_VALUE:
            raise UserError(
                f"{origin}: the label is {label!r}, no value; name the class or blank the cell, "
                "or list it among --labels, if it is a class"
            )
        if FRACTION.fullmatch(label):
            raise UserError(
                f"{origin}: the label {label!r} is a number with a fraction, a score and no class; "
                "set --label-column to a column of classes, or list the classes by --labels"
            )
    check_case(first.items())


def classes_of(lines: Sequence[Line]) -> list[str]:
    """The labels of the training split, or of all where there is none, sorted, whole numbers by their size.

    Raises:
        UserError: there is none, or there are too many for classes: above MANY_CLASSES with fewer than ten rows each,
            or from MANY_ROWS rows on with fewer than three.
    """
    table = lines[0].origin.rpartition(" row ")[0]
    train = [line for line in lines if line.split == "train"]
    every = [label for line in train or lines if (label := line.cells["label"])]
    labels, rows = set(every), len(every)
    if not labels:
        raise UserError(f"{table}: no {'training ' if train else ''}row has a label; label some")
    if (10 * len(labels) > rows and len(labels) > MANY_CLASSES) or 3 * len(labels) > rows >= MANY_ROWS:
        some = ", ".join(sorted(labels)[:5])
        raise UserError(
            f"{table}: {len(labels)} labels in {rows} labelled rows ({some}, ...) are "
            "too many for classes; set --label-column to a column of classes, or list the classes by --labels"
        )
    numbers = all(re.fullmatch(r"-?\d+", label) for label in labels)
    return sorted(labels, key=lambda label: (int(label) if numbers else 0, label))


def class_number(line: Line, classes: Sequence[str]) -> int | None:
    """The position of a row's label among the classes; None without a label. Raises UserError with the nearest one."""
    label = line.cells["label"]
    if not label:
        return None
    if label in classes:
        return classes.index(label)
    alike = [one for one in classes if one.casefold() == label.casefold()]
    near = alike or difflib.get_close_matches(label, classes, 1, 0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(classes)}"
    raise UserError(f"{line.origin}: unknown label {label!r}; {hint} (--labels sets the list)")


def check_case(labels: Iterable[tuple[str, str]]) -> None:
    """Refuse (label, place) pairs of which two labels differ by case alone."""
    seen: dict[str, tuple[str, str]] = {}
    for label, place in labels:
        other, there = seen.setdefault(label.casefold(), (label, place))
        if other != label:
            alike = f"{label!r} and {other!r}" + ("" if there == place else f" ({there})")
            raise UserError(f"{place}: the labels {alike} differ by case alone; write them alike")


# ---------------------------------------------------------------------------------------------------------------- votes


def check_one_label(lines: Sequence[Line]) -> None:
    """Refuse a clip that has rows of several labels. Raises UserError with the two rows."""
    for poll in polls(lines):
        first = poll.lines[0]
        for line in poll.lines:
            if line.cells["label"] != first.cells["label"]:
                what = line.cells.get("audio") or f"turn {line.cells['turn']} of {line.cells['dialogue']}"
                other = f"in {_row(first)}, {first.cells['label']!r}"
                raise UserError(
                    f"{line.origin}: {what} is {line.cells['label']!r} and, {other}; "
                    "give --votes majority, if a row is a rater's vote, or each row its own clip or its start and end"
                )


def votes_of(lines: Sequence[Line]) -> list[Poll]:
    """The rows by utterance, each a vote. Raises UserError where two of one utterance differ in more than the label."""
    every = polls(lines)
    for poll in every:
        first = poll.lines[0]
        for line in poll.lines:
            differing = next((part for part in AGREEING if line.cells.get(part) != first.cells.get(part)), None)
            if differing is None and line.split != first.split:
                differing = "split"
            if differing:
                raise UserError(
                    f"{line.origin}: rates the clip of {_row(first)} but has another {differing}; "
                    "rows of one vote differ in the label alone"
                )
    return every


def lost_votes(every: Sequence[Poll]) -> dict[str, dict[str, int]]:
    """Split -> why rows are no utterance -> how many."""
    lost: dict[str, dict[str, int]] = {}
    for poll in every:
        tied = poll.elected is None
        reason, count = (TIED_VOTES, len(poll.lines)) if tied else (FURTHER_VOTES, len(poll.lines) - 1)
        if count:
            of_split = lost.setdefault(poll.lines[0].split, {})
            of_split[reason] = of_split.get(reason, 0) + count
    return lost


def tied_votes(every: Sequence[Poll]) -> list[Fault]:
    """A fault a split that names utterances whose votes are tied."""
    tied: dict[str, list[Line]] = {}
    for poll in every:
        if poll.elected is None:
            tied.setdefault(poll.lines[0].split, []).append(poll.lines[0])
    faults = []
    for split, lines in tied.items():
        some = ", ".join(line.cells.get("audio") or _row(line) for line in lines[:NAMED])
        what = f"{len(lines)} utterance(s) whose votes are tied ({some}{', ...' if len(lines) > NAMED else ''})"
        faults.append(Fault(split, _row(lines[0]).rpartition(" row ")[0], what, "left out"))
    return faults


def polls(lines: Sequence[Line]) -> list[Poll]:
    """Rows by utterance: of one clip and time or, without clip, of one turn; others stand alone."""
    by_utterance: dict[tuple[object, ...], Poll] = {}
    for number, line in enumerate(lines):
        cells = line.cells
        utterance: tuple[object, ...] = (number,)
        if audio := cells.get("audio"):
            times = [seconds_of(cells.get(part, ""), line.origin) for part in ("start", "end")]
            utterance = os.path.normpath(line.folder / audio), *times
        elif cells.get("dialogue") and cells.get("turn"):
            utterance = line.split, cells["dialogue"], cells["turn"]
        by_utterance.setdefault(utterance, Poll([])).lines.append(line)
    return list(by_utterance.values())


def _row(line: Line) -> str:
    return line.origin.rpartition("/")[2]
