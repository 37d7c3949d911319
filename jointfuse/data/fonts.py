"""Letters in pictures: for names in any script, fonts of this machine that have its glyphs."""

import sys
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache

from matplotlib import font_manager, rc_context, rcParams
from matplotlib.ft2font import FT2Font

EAST_ASIAN = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO", "IDEOGRAPHIC", "FULLWIDTH", "HALFWIDTH", "YI")


@contextmanager
def lettering(texts: Iterable[str]) -> Iterator[None]:
    """Pictures that are drawn and saved within show these texts, where an installed font has their glyphs; a line on
    standard error says what none has, and which package brings it."""
    lacking = frozenset("".join(texts)) - _glyphs(font_manager.findfont(font_manager.FontProperties()))
    families, left = _fonts_with(frozenset(letter for letter in lacking if letter.isprintable() and letter != " "))
    if left:
        print(_note(left), file=sys.stderr)
    with rc_context({"font.family": [*rcParams["font.family"], *families]}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield


@cache
def _glyphs(path: str) -> frozenset[str]:
    """The characters that a font has; none where it cannot be read or drawn from."""
    try:
        font = FT2Font(path)
        return frozenset(map(chr, font.get_charmap())) if font.scalable else frozenset()
    except (OSError, RuntimeError):
        return frozenset()


@cache
def _fonts_with(letters: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Names of fonts that have as many of these characters as any has, and the characters that none has."""
    families, left = [], letters
    # matplotlib's own list is of the day it was made: a font that was installed for these names is not in it.
    paths = sorted(font_manager.findSystemFonts()) if letters else []
    while left and paths:
        best = max(paths, key=lambda path: len(left & _glyphs(path)))
        if not left & _glyphs(best):
            break
        font_manager.fontManager.addfont(best)
        families.append(FT2Font(best).family_name)
        left -= _glyphs(best)
    return tuple(families), left


def _note(letters: frozenset[str]) -> str:
    by_script: dict[str, list[str]] = {}
    for letter in sorted(letters):
        by_script.setdefault(unicodedata.name(letter, "UNKNOWN").split()[0].split("-")[0], []).append(letter)
    scripts = ", ".join(f"{script} ({''.join(held[:8])})" for script, held in by_script.items())
    wanted = {"fonts-noto-cjk" if script in EAST_ASIAN else "fonts-noto-core" for script in by_script}
    return (
        f"note: no font of this machine has the letters of {scripts}, which are boxes in pictures; "
        f"install one (Debian: apt install {' '.join(sorted(wanted))})"
    )
