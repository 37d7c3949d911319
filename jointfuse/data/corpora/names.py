"""Names of classes, speakers, dialogues and splits: those that look alike are alike."""

import difflib
import re
import unicodedata

from jointfuse.errors import UserError

# What leaves no ink though it is no format character: fillers, a joiner, selectors of variants.
_INVISIBLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0]")
_SPLITS = {
    "train": ("train", "training"),
    "dev": ("dev", "devel", "development", "val", "valid", "validation"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_KNOWN = {spelling: split for split, spellings in _SPLITS.items() for spelling in spellings}
_NEAR = 0.75  # similarity to a known name from which on a split is taken for misspelt


def plain_text(cell: str) -> str:
    """A text in Unicode's composed form (NFC), its ends stripped and no character lost; empty if none is visible."""
    return unicodedata.normalize("NFC", cell).strip() if plain_name(cell) else ""


def plain_name(cell: str) -> str:
    """A name in composed form, without what cannot be seen: zero-width characters, marks of direction, soft hyphens,
    byte order marks, controls; any run of spaces, no-break ones too, is one space."""
    if cell.isascii() and cell.isalnum():
        return cell
    spaced = " ".join(_INVISIBLE.sub("", cell).split())
    seen = "".join(char for char in spaced if unicodedata.category(char) not in ("Cf", "Cc"))
    return unicodedata.normalize("NFC", " ".join(seen.split()))


def known_split(cell: str) -> str | None:
    """train, dev or test, if `cell` is one of their usual names in any case; test1 of `Test 1` likewise."""
    word = re.sub(r"[\s_-]+", "", cell.lower())
    numbered = re.fullmatch(r"([a-z]+)(\d{1,3})", word)
    if numbered and _KNOWN.get(numbered[1], "train") != "train":
        return f"{_KNOWN[numbered[1]]}{int(numbered[2])}"
    return _KNOWN.get(word)


def split_name(cell: str, origin: str) -> str:
    """The split that a cell names: one of known_split, or another one in lower case, without spaces.

    Raises:
        UserError: the cell is blank, is no name for a folder, or looks like a misspelt name of a known split.
    """
    if not cell:
        raise UserError(f"{origin}: the split cell is blank; write train, dev or test")
    if known := known_split(cell):
        return known
    name = "".join(cell.split()).lower()
    if near := difflib.get_close_matches(re.sub(r"[_-]", "", name), _KNOWN, 1, _NEAR):
        raise UserError(f"{origin}: no split {cell!r}; did you mean {near[0]!r}? (another split: a name unlike it)")
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,31}", name):
        raise UserError(f"{origin}: {cell!r} is no name for a split; use train, dev and test")
    return name
