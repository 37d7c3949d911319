"""Names in any script in pictures: drawn where a font of the machine has the letters, and said where none has."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from helpers import SIZES, build_corpus
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.image import imread

from jointfuse.data import fonts
from jointfuse.data.fonts import lettering
from jointfuse.data.stats import corpus_stats, plot
from jointfuse.evaluate.corpus_page import write_corpus_page
from jointfuse.evaluate.metrics import Predictions, score
from jointfuse.evaluate.report import write_comparison, write_report

pytestmark = pytest.mark.required
SQUARE = [(100, 0), (900, 0), (900, 800), (100, 800)]
CYRILLIC, HAN = ["гнев", "радость", "страх"], ["高兴", "生气", "平静"]


@pytest.fixture(autouse=True)
def no_system_fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the machine's fonts only matplotlib's own."""
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [])
    fonts._fonts_with.cache_clear()


@pytest.fixture
def han_font(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A font with a full square for each of HAN's characters, the only one that is installed."""
    letters = "".join(HAN)
    builder = FontBuilder(1000, isTTF=True)
    names = {letter: f"han{number}" for number, letter in enumerate(letters)}
    order = [".notdef", *names.values()]
    pen = TTGlyphPen(None)
    pen.moveTo(SQUARE[0])
    for point in SQUARE[1:]:
        pen.lineTo(point)
    pen.closePath()
    square = pen.glyph()
    builder.setupGlyphOrder(order)
    builder.setupCharacterMap({ord(letter): name for letter, name in names.items()})
    builder.setupGlyf(dict.fromkeys(order, square))
    builder.setupHorizontalMetrics(dict.fromkeys(order, (1000, 100)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Squares for tests", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    path = tmp_path / "squares.ttf"
    builder.save(path)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(path)])
    return path


def missing(figure: Figure, path: Path) -> list[str]:
    """What matplotlib says of letters that it has no glyph for."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(path)
    return [str(one.message) for one in caught if "missing from" in str(one.message)]


def written(text: str, path: Path) -> list[str]:
    with lettering([text]):
        figure = Figure(figsize=(3, 1))
        figure.text(0.1, 0.5, text)
        return missing(figure, path)


def test_cyrillic_is_drawn_with_the_font_that_is_always_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (*CYRILLIC, "θυμός", "naïve\nZoë"):
        assert written(name, tmp_path / "a.png") == []
    assert capsys.readouterr().err == ""


def test_letters_that_only_another_font_has_are_drawn_with_it(
    han_font: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (*HAN, f"joy {HAN[0]}"):
        assert written(name, tmp_path / "a.png") == []
    assert capsys.readouterr().err == ""
    with lettering(HAN):
        figure = Figure(figsize=(2, 1), dpi=100)
        figure.text(0.0, 0.0, HAN[0], fontsize=72)
        figure.savefig(tmp_path / "squares.png")
    assert (imread(tmp_path / "squares.png")[30:90, 20:80, :3] < 0.1).mean() > 0.9, "a full square, no empty box"


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (
            HAN,
            "has the letters of CJK (兴平气生静高), which are boxes in pictures; "
            "install one (Debian: apt install fonts-noto-cjk)",
        ),
        (["行복", "खुशी"], "install one (Debian: apt install fonts-noto-cjk fonts-noto-core)"),
    ],
)
def test_what_no_font_has_is_one_line_that_names_the_script_and_a_package(
    texts: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with lettering(texts):
            figure = Figure(figsize=(3, 1))
            figure.text(0.1, 0.5, "".join(texts))
            figure.savefig(tmp_path / "a.png")
    said = capsys.readouterr().err
    assert said.startswith("note: no font of this machine ")
    assert said.count("\n") == 1
    assert says in said


def test_a_damaged_font_is_left_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.ttf").write_bytes(b"not a font")
    monkeypatch.setattr(
        font_manager, "findSystemFonts", lambda: [str(tmp_path / "bad.ttf"), str(tmp_path / "gone.ttf")]
    )
    with lettering(HAN):
        pass


@pytest.mark.filterwarnings("error")
def test_every_picture_of_a_report_and_of_a_corpus_is_drawn_with_them(
    han_font: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warnings, "filterwarnings", lambda *_, **__: None)  # what is missing is an error here
    labels = np.arange(12) % 3
    predictions = Predictions(labels, np.eye(3, dtype=np.float32)[labels], np.eye(12, 4, dtype=np.float32))
    scores = score(labels, labels, HAN)
    whole: dict[str, object] = {"title": "", "settings_yaml": "", "corpus": {"name": "x"}, "history": [], "hard": []}
    write_report(tmp_path / "report", score=scores, names=HAN, predictions=predictions, **whole)  # type: ignore[arg-type]
    write_comparison(tmp_path, {"one": scores}, HAN, {}, "", "")
    corpus = build_corpus(tmp_path / "corpus", labels=[*HAN, "平高"], sizes=SIZES)
    plot(corpus, corpus_stats(corpus), tmp_path / "stats.png")
    write_corpus_page(corpus, tmp_path / "page.html")
