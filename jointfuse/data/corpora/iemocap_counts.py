"""How many turns of IEMOCAP have which label: the figures of the literature, and what a release gives.

5531 turns are of the four classes, excited joined into happy. Of six classes the literature knows two figures, 7380 and
7433. The first counts the majority labels of the label files; the second is of DialogueRNN's features, whose making was
not published. They differ in `happy` alone: counted is which turns of the label files could be the rest.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from jointfuse.data.corpora.iemocap import LABELS, VIEWS, Release, Turn
from jointfuse.data.rows import Fault
from jointfuse.errors import UserError

# Majority labels of the release. 5531 are of the four classes, 7380 of the six.
PUBLISHED = {
    "hap": 595,
    "sad": 1084,
    "neu": 1708,
    "ang": 1103,
    "exc": 1041,
    "fru": 1849,
    "sur": 107,
    "fea": 40,
    "dis": 2,
    "oth": 3,
    "xxx": 2507,
}
# What papers on DialogueRNN's features tabulate, training (sessions 1 to 4) and test (session 5): 5810 + 1623 = 7433.
TABULATED = {
    "hap": (504, 144),
    "sad": (839, 245),
    "neu": (1324, 384),
    "ang": (933, 170),
    "exc": (742, 299),
    "fru": (1468, 381),
}


def check_counts(release: Release, published: Mapping[str, int] = PUBLISHED) -> None:
    """Refuse a release whose four classes do not hold the published number of turns.

    Args:
        published: code of the label files -> how many turns have it.

    Raises:
        UserError: with every label of the four classes whose count differs.
    """
    for fault in count_faults(release, published):
        raise UserError(
            f"{release.path}: {fault.fault}; unpack the release again, whole, or build a part with --partial"
        )


def count_faults(release: Release, published: Mapping[str, int] = PUBLISHED) -> list[Fault]:
    """The same for a part of a release, which is built nevertheless: a fault, or none."""
    found, expected = release.count(VIEWS["four"]), sum(published.get(code, 0) for code in VIEWS["four"])
    if found == expected:
        return []
    differing = ", ".join(
        f"{LABELS[code]} {release.codes[code]} of {published.get(code, 0)}"
        for code in VIEWS["four"]
        if release.codes[code] != published.get(code, 0)
    )
    counts = f"the label files give {found} turns in four classes, published are {expected} ({differing})"
    return [Fault("", "EmoEvaluation", counts, "built as they are")]


def describe_counts(release: Release, view: str, published: Mapping[str, int] = PUBLISHED) -> list[str]:
    """Lines for people: how many turns each view has by the label files, and where the two published figures differ."""
    codes, turns = release.codes, release.turns
    dialogues = len({turn.dialogue for turn in turns})
    whole = {code: "" if codes[code] == published.get(code, 0) else f" of {published.get(code, 0)}" for code in LABELS}
    by_label = ", ".join(f"{name} {codes[code]}{whole[code]}" for code, name in LABELS.items())
    figures = sum(published[code] for code in VIEWS["six"]), sum(map(sum, TABULATED.values()))
    lines = [
        f"label files: {len(turns)} turns in {dialogues} dialogues: {by_label}",
        f"four classes, excited joined into happy: {release.count(VIEWS['four'])}, "
        f"published {sum(published[code] for code in VIEWS['four'])}",
        f"six classes: {release.count(VIEWS['six'])}; the literature has {figures[0]} (majority labels) and "
        f"{figures[1]} (DialogueRNN's features, as papers tabulate them)",
    ]
    for code, tabulated in TABULATED.items():
        lines += _difference(turns, code, tabulated)
    spoken = [turn for turn in turns if turn.text is not None]
    heard = Counter(LABELS[turn.code] for turn in spoken if turn.code not in VIEWS[view])
    if heard:
        lines.append(
            f"not of the view {view!r}, kept without a label as context of the others: {heard.total()} turns ("
            + ", ".join(f"{name} {count}" for name, count in heard.most_common())
            + ")"
        )
    if not release.text_only:
        no_clip = sum(turn.clip is None for turn in spoken)
        lines.append(f"without a usable clip, kept without a label as context: {no_clip} turns")
    lines.append(f"left out: {len(turns) - len(spoken)} turns without a transcript")
    return lines


def _difference(turns: Sequence[Turn], code: str, tabulated: tuple[int, int]) -> Iterator[str]:
    """How a label's majority count differs from the tabulated one, and which turns of the label files could be why."""
    name, joined = LABELS[code], {"hap", "exc"} if code in ("hap", "exc") else {code}
    found = _per_part([turn for turn in turns if turn.code == code])
    if found == tabulated:
        return
    yield (
        f"  {name}: {found[0]} + {found[1]} by majority in sessions 1 to 4 and 5, {tabulated[0]} + {tabulated[1]} in "
        f"the larger figure: {tabulated[0] - found[0]:+d} and {tabulated[1] - found[1]:+d}. The label files have"
    )
    undecided = [turn for turn in turns if turn.code == "xxx"]
    causes = {
        "undecided, with a vote for it": [turn for turn in undecided if code in turn.votes],
        "undecided, with no emotion voted more often": [turn for turn in undecided if code in _most_voted(turn.votes)],
        f"undecided, with more than half of the votes for {' or '.join(LABELS[one] for one in sorted(joined))}": [
            turn for turn in undecided if 2 * sum(vote in joined for vote in turn.votes) > len(turn.votes)
        ],
        "of a label outside the six, with a vote for it": [
            turn for turn in turns if turn.code not in VIEWS["six"] and turn.code != "xxx" and code in turn.votes
        ],
        "of another of the six, with a vote for it": [
            turn for turn in turns if turn.code in VIEWS["six"] and turn.code != code and code in turn.votes
        ],
    }
    for cause, some in causes.items():
        yield "    {} + {} turns {}".format(*_per_part(some), cause)


def _per_part(turns: Sequence[Turn]) -> tuple[int, int]:
    """How many are of sessions 1 to 4, and of session 5."""
    return sum(turn.session < 5 for turn in turns), sum(turn.session == 5 for turn in turns)


def _most_voted(votes: Sequence[str]) -> set[str]:
    counts = Counter(votes)
    return {code for code, count in counts.items() if count == max(counts.values())}
