#!/usr/bin/env python
"""Build a corpus: a folder of WebDataset shards with an index.

tools/build_shards.py table --train train.csv --dev dev.csv --test test.csv --out corpora/mine
tools/build_shards.py table all.csv --out corpora/mine          # the split is a column
tools/build_shards.py meld MELD.Raw --out corpora/meld
tools/build_shards.py spoken --out corpora/demo                 # synthetic, made by espeak-ng in a minute
tools/build_shards.py iemocap IEMOCAP_full_release --out corpora/iemocap
tools/build_shards.py ravdess RAVDESS --out corpora/ravdess     # so do nemo and emodb
tools/build_shards.py files mine.yaml FOLDER --out corpora/mine # file names say it all; see corpora/ravdess.yaml
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from jointfuse.errors import ReadableError, UserError, line_and_status

FAULTS_SHOWN = 20

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Build a corpus of shards.", rich_markup_mode=None)

Out = Annotated[Path, typer.Option(help="folder of the new corpus")]
Workers = Annotated[int | None, typer.Option(help="processes; default: one a core")]
Partial = Annotated[bool, typer.Option("--partial", help="build what is there, and list what is not")]
PerShard = Annotated[int, typer.Option(help="samples a shard, at most, unless one dialogue is longer")]


@app.command()
def table(
    out: Out,
    tables: Annotated[list[Path] | None, typer.Argument(help="tables with a split column")] = None,
    train: Annotated[Path | None, typer.Option(help="table of the training split")] = None,
    dev: Annotated[Path | None, typer.Option(help="table of the development split")] = None,
    test: Annotated[Path | None, typer.Option(help="table of the test split")] = None,
    name: Annotated[str | None, typer.Option(help="default: the folder's name")] = None,
    labels: Annotated[str | None, typer.Option(help="classes in order, a,b,c; default: train's, sorted")] = None,
    source: Annotated[str, typer.Option(help="where the data come from")] = "",
    licence: Annotated[str, typer.Option(help="under which terms")] = "",
    description: Annotated[str, typer.Option(help="what they are")] = "",
    text_column: str | None = None,
    label_column: str | None = None,
    audio_column: str | None = None,
    speaker_column: str | None = None,
    dialogue_column: str | None = None,
    turn_column: str | None = None,
    split_column: str | None = None,
    start_column: str | None = None,
    end_column: str | None = None,
    allow_missing: Annotated[bool, typer.Option(help="blank text or audio cells are meant")] = False,
    dialogues_per_table: Annotated[bool, typer.Option(help="dialogue numbers start again in every split")] = False,
    unlabelled: Annotated[
        Literal["refuse", "context"], typer.Option(help="blank labels: context, heard before the turns behind them")
    ] = "refuse",
    votes: Annotated[
        str | None, typer.Option(help="majority: a clip's rows, one a rater, become one utterance")
    ] = None,
    times: Annotated[
        str, typer.Option(help="auto: start and end are cut out of longer recordings; recorded: clips are cut already")
    ] = "auto",
    workers: Workers = None,
    samples_per_shard: PerShard = 500,
) -> None:
    """Your own data, listed in CSV, TSV or JSONL tables: one row an utterance, clips relative to the table."""
    from jointfuse.data.build import build
    from jointfuse.data.corpora.table import table_corpus

    by_split = [(split, path) for split, path in (("train", train), ("dev", dev), ("test", test)) if path is not None]
    if bool(tables) == bool(by_split):
        raise UserError("give either tables with a split column, or --train, --dev and --test")
    columns = {
        "text": text_column,
        "label": label_column,
        "audio": audio_column,
        "speaker": speaker_column,
        "dialogue": dialogue_column,
        "turn": turn_column,
        "split": split_column,
        "start": start_column,
        "end": end_column,
    }
    spec = table_corpus(
        by_split or [(None, path) for path in tables or []],
        name or out.resolve().name,
        columns,
        labels.split(",") if labels is not None else None,
        source,
        licence,
        description,
        allow_missing,
        dialogues_per_table,
        unlabelled == "context",
        votes,
        times,
    )
    for line in spec.notes:
        print(line)
    _tell(build(spec, out, workers, samples_per_shard), out)


@app.command()
def spoken(
    out: Out,
    dialogues: Annotated[int, typer.Option(help="of the training split; dev and test follow in proportion")] = 290,
    seed: Annotated[int, typer.Option(help="another seed is another corpus")] = 0,
    name: Annotated[str | None, typer.Option(help="default: the folder's name")] = None,
    workers: Workers = None,
    samples_per_shard: PerShard = 500,
) -> None:
    """A synthetic demo corpus: dialogues spoken by espeak-ng, with emotion half in the words, half in the voice."""
    from jointfuse.data.build import build
    from jointfuse.data.corpora.spoken import spoken_corpus

    spec = spoken_corpus(name or out.resolve().name, dialogues, seed)
    _tell(build(spec, out, workers, samples_per_shard), out)


@app.command()
def meld(
    raw: Annotated[Path, typer.Argument(help="MELD.Raw.tar.gz, or the folder it unpacks to")],
    out: Out,
    text_only: Annotated[bool, typer.Option("--text-only", help="without the clips; the CSVs are enough then")] = False,
    partial: Partial = False,
    scratch: Annotated[Path | None, typer.Option(help="folder to unpack archives into; default: OUT.raw")] = None,
    name: Annotated[str | None, typer.Option(help="default: the folder's name")] = None,
    workers: Workers = None,
    samples_per_shard: PerShard = 500,
) -> None:
    """MELD as its authors distribute it: three CSVs and the MP4 clips, their known faults treated and named."""
    from jointfuse.data.build import build
    from jointfuse.data.corpora.meld import meld_corpus

    scratch = scratch or out.resolve().with_name(f"{out.resolve().name}.raw")
    spec = meld_corpus(raw, name or out.resolve().name, text_only, scratch, partial=partial)
    _tell(build(spec, out, workers, samples_per_shard), out)


@app.command()
def iemocap(
    raw: Annotated[Path, typer.Argument(help="IEMOCAP_full_release, unpacked")],
    out: Out,
    view: Annotated[str, typer.Option(help="six, four (excited joined into happy) or all labels")] = "six",
    test_session: Annotated[int, typer.Option(help="the session left out of training")] = 5,
    dev: Annotated[float, typer.Option(help="a share of the other sessions' dialogues, or one of their numbers")] = 0.1,
    text_only: Annotated[bool, typer.Option("--text-only", help="without the clips, which need not be there")] = False,
    partial: Partial = False,
    name: Annotated[str | None, typer.Option(help="default: the folder's name")] = None,
    workers: Workers = None,
    samples_per_shard: PerShard = 500,
) -> None:
    """IEMOCAP from its release: five sessions, one of them the test split."""
    from jointfuse.data.build import build
    from jointfuse.data.corpora.iemocap import iemocap_corpus, read_release
    from jointfuse.data.corpora.iemocap_counts import check_counts, count_faults, describe_counts

    release = read_release(raw, text_only, partial)
    spec = iemocap_corpus(release, name or out.resolve().name, view, test_session, dev)
    if partial:
        spec = replace(spec, faults=[*count_faults(release), *spec.faults])
    else:
        check_counts(release)
    for line in describe_counts(release, view):
        print(line)
    _tell(build(spec, out, workers, samples_per_shard), out)


@app.command()
def files(
    description: Annotated[str, typer.Argument(help="YAML file, or ravdess, nemo, emodb")],
    raw: Annotated[Path, typer.Argument(help="folder of the sound files, at any depth")],
    out: Out,
    name: Annotated[str | None, typer.Option(help="default: the folder's name")] = None,
    workers: Workers = None,
    samples_per_shard: PerShard = 500,
) -> None:
    """A corpus whose file names say it all, described by a YAML file of some ten lines."""
    from jointfuse.data.build import build
    from jointfuse.data.corpora.descriptions import read_description
    from jointfuse.data.corpora.files import files_corpus

    spec = files_corpus(raw, read_description(description), name or out.resolve().name)
    for line in spec.notes:
        print(line)
    _tell(build(spec, out, workers, samples_per_shard), out)


def _command(shipped: str) -> Callable[..., None]:
    """`files` with a description that comes with the package."""

    def command(
        raw: Annotated[Path, typer.Argument(help="folder of the unpacked corpus")],
        out: Out,
        name: Annotated[str | None, typer.Option(help="default: the folder's name")] = None,
        workers: Workers = None,
        samples_per_shard: PerShard = 500,
    ) -> None:
        files(shipped, raw, out, name, workers, samples_per_shard)

    return command


for shipped in ("ravdess", "nemo", "emodb"):
    app.command(shipped, help=f"As `files {shipped}`: the corpus as it is distributed.")(_command(shipped))


def _tell(info: dict, out: Path) -> None:
    from jointfuse.data.observe import LACKING_CLASS, observe_classes

    for split, content in info["splits"].items():
        hours = content["seconds"] / 3600
        unlabelled = f" ({content['unlabelled']} without a label)" if content.get("unlabelled") else ""
        counts = f"{content['samples']} utterances{unlabelled}, {content['dialogues']} dialogues, {hours:.2f} h"
        print(f"{split}: {counts}, {len(content['shards'])} shard(s)")
    if "train" not in info["splits"]:
        print("no training split (`train`): models can be scored on this corpus, none trained")
    for split, rows in info.get("rows", {}).items():
        fates = ", ".join(f"{count} {fate}" for fate, count in rows.items() if fate != "read")
        print(f"{split or 'in no split'}: {rows['read']} rows read: {fates}")
    for split, line in observe_classes(info["splits"]):
        print(f"observed: {LACKING_CLASS}: {split}: {line}")
    if info["faults"]:
        print(f"{len(info['faults'])} fault(s) in what it was made from, listed as `faults` in {out / 'corpus.json'}:")
        for fault in info["faults"][:FAULTS_SHOWN]:
            place = " ".join(filter(None, (fault["split"], fault["key"] or fault["file"])))
            print(f"  {place}: {fault['fault']}; {fault['done']}")
    for kind, count in info["observed"].items():
        print(f"observed: {kind}: {count}; `tools/verify_shards.py {out}` lists them")
    print(f"{out}: finished")


def main() -> None:
    try:
        app()
    except (ReadableError, OSError) as error:
        line, status = line_and_status(error)
        print("error:", " ".join(line.split()), file=sys.stderr)
        sys.exit(status)


if __name__ == "__main__":
    main()
