#!/usr/bin/env python
"""Show what is in a corpus: tables, with --png a picture, with --page a page with samples to look at and hear."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from jointfuse.errors import ReadableError, UserError, line_and_status


def command(
    corpus: Annotated[Path, typer.Argument(help="folder of the corpus")],
    png: Annotated[Path | None, typer.Option(help="also draw a picture into this file")] = None,
    page: Annotated[Path | None, typer.Option(help="also write a page about the corpus into this .html file")] = None,
) -> None:
    """Counts, durations, speakers and dialogue lengths of a corpus."""
    from rich.console import Console

    from jointfuse.data.shards import Corpus
    from jointfuse.data.stats import corpus_stats, plot, tables

    for option, path, suffix in (("--png", png, ".png"), ("--page", page, ".html")):
        if path is not None and path.suffix.lower() != suffix:
            raise UserError(f"{option} {path}: give a name ending in {suffix}")
        if path is not None and not path.parent.is_dir():
            raise UserError(f"{option} {path}: there is no folder {path.parent}; make it first")
    opened = Corpus.open(corpus)
    stats = corpus_stats(opened)
    for table in tables(opened, stats):
        Console().print(table)
    if png is not None:
        plot(opened, stats, png)
        print(f"{png}: drawn")
    if page is not None:
        from jointfuse.evaluate.corpus_page import write_corpus_page

        write_corpus_page(opened, page)
        print(f"{page}: written")


def main() -> None:
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(command)
    try:
        app()
    except (ReadableError, OSError) as error:
        line, status = line_and_status(error)
        print("error:", " ".join(line.split()), file=sys.stderr)
        sys.exit(status)


if __name__ == "__main__":
    main()
