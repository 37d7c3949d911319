#!/usr/bin/env python
"""Read a corpus again, all of it: what is not as recorded, and what else one should know of it.

Exit status: 0 sound, whatever was observed; 1 faults; 2 no corpus.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from jointfuse.errors import ReadableError, line_and_status


def command(
    corpus: Annotated[Path, typer.Argument(help="folder of the corpus")],
    workers: Annotated[int | None, typer.Option(help="processes; default: one a core")] = None,
) -> None:
    """Read a corpus again, all of it: faults (exit status 1), and observations, which are none: silent or clipped
    clips, channels that cancelled, rows that overlap, the same clip twice, times that run backwards, speakers across
    splits, a class that a split lacks."""
    from jointfuse.data.verify import verify

    report = verify(corpus, workers)
    for fault in report.faults:
        print(fault)
    for kind, count in report.observations.counts.items():
        lines = report.observations.lines[kind]
        print(f"observed: {kind}: {count}")
        for line in lines:
            print(f"    {line}")
        if count > len(lines):
            print(f"    and {count - len(lines)} more")
    amount = f"{report.samples} samples, {report.shards} shards, {report.bytes / 1e6:.1f} MB, {report.splits} splits"
    seen = report.observations.counts.total()
    print(f"{corpus}: {len(report.faults) or 'no'} fault(s) in {amount}; {seen or 'no'} observation(s)")
    if report.faults:
        raise typer.Exit(1)


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
