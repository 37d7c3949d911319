"""The shell and the pieces of the pages: one HTML file each, which needs no network, no server and no script."""

import base64
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from matplotlib.figure import Figure

from jointfuse.evaluate.pictures import PALETTE, to_svg
from jointfuse.files import write_text


def card(heading: str, hint: str, content: str, long: bool = False) -> str:
    """A box of the page; heading, hint and content are HTML."""
    kind = "card long" if long else "card"
    return f'<section class="{kind}"><h2>{heading}</h2><p class="hint">{hint}</p>{content}</section>'


def picture(figure: Figure, alt: str, wide: bool = False) -> str:
    kind = ' class="wide"' if wide else ""
    address = data_address("image/svg+xml", to_svg(figure).encode())
    return f'<div class="figure"><img{kind} alt="{escape(alt)}" src="{address}"></div>'


def data_address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def swatch(index: int) -> str:
    return f'<span class="swatch" style="background:{PALETTE[index % len(PALETTE)]}"></span>'


def paragraph(text: str) -> str:
    return f'<p class="muted">{escape(text)}</p>' if text else ""


def write_page(path: Path, title: str, parts: list[str]) -> Path:
    shell = Template(files("jointfuse.evaluate").joinpath("report.html").read_text(encoding="utf-8"))
    page = shell.substitute(title=escape(title), body="\n".join(parts))
    write_text(path, page)
    return path


def heard(flac: bytes | None) -> str:
    """A player of a whole FLAC file, carried in the page."""
    if flac is None:
        return '<span class="none">no audio</span>'
    return f'<audio controls preload="none" src="{data_address("audio/flac", flac)}"></audio>'
