"""python -m jointfuse.bench icl | block | step | checkpointing | data | plan | build | kernels"""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from jointfuse.errors import ReadableError, line_and_status

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Measure jointfuse beside its peers on this machine."
)


@app.callback()
def _commands() -> None:
    """Each benchmark is a command, and computes as training does."""
    import torch

    from jointfuse.gpu import choose_kernels

    if torch.cuda.is_available():
        choose_kernels()


@app.command()
def icl(
    rows: Annotated[list[int] | None, typer.Option(help="sizes K of the pool; repeat the option for several")] = None,
    width: Annotated[list[int] | None, typer.Option(help="widths D of the features; likewise")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    repeats: Annotated[int, typer.Option(min=1, help="rounds; the fastest of each method counts")] = 3,
    ranks: Annotated[int, typer.Option(min=1, help="processes that share the pool")] = 1,
    only: Annotated[list[str] | None, typer.Option(help="methods to measure, by name; all of them unless set")] = None,
    out: Annotated[Path | None, typer.Option(help="result file; build/bench/icl-DEVICE.json unless set")] = None,
) -> None:
    """The contrastive loss, forward and backward: time, memory above the features, share of the matmul rate."""
    from jointfuse.bench.icl import benchmark_icl

    benchmark_icl(rows, width, dtype, repeats, ranks, only, out, _console())


@app.command()
def block(
    batch: Annotated[int, typer.Option(min=1, help="utterances B")] = 8,
    patches: Annotated[int, typer.Option(min=1, help="mel patches P")] = 310,
    tokens: Annotated[int, typer.Option(min=1, help="text tokens T")] = 24,
    width: Annotated[int, typer.Option(min=64, help="of both streams, in heads of 64")] = 768,
    joint_vectors: Annotated[int, typer.Option(min=1, help="J")] = 4,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    repeats: Annotated[int, typer.Option(min=1, help="rounds; the fastest of each form counts")] = 5,
    out: Annotated[Path | None, typer.Option(help="result file; build/bench/block-DEVICE.json unless set")] = None,
) -> None:
    """The joint-fusion block in one pass a stream, beside its literal two-pass form."""
    from jointfuse.bench.block import benchmark_block

    benchmark_block(batch, patches, tokens, width, joint_vectors, dtype, repeats, out, _console())


@app.command()
def step(
    recipe: Annotated[str, typer.Option(help="a recipe by name, or a path to a .yaml file")],
    overrides: Annotated[list[str] | None, typer.Argument(help="settings, as section.key=value")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="processes")] = 2,
    steps: Annotated[int, typer.Option(min=2, help="steps of each model")] = 10,
    out: Annotated[Path | None, typer.Option(help="result file; build/bench/step-DEVICE.json unless set")] = None,
    profile: Annotated[Path | None, typer.Option(help="also trace a step of ours, for chrome://tracing")] = None,
) -> None:
    """A training step beside the same model written plainly with transformers, timm and DDP."""
    from jointfuse.bench.step import benchmark_step

    benchmark_step(recipe, overrides or [], ranks, steps, out, profile, _console())


@app.command()
def checkpointing(
    recipe: Annotated[str, typer.Option(help="a recipe by name, or a path to a .yaml file")],
    overrides: Annotated[list[str] | None, typer.Argument(help="settings, as section.key=value")] = None,
    steps: Annotated[int, typer.Option(min=1, help="steps of each mode")] = 5,
    out: Annotated[
        Path | None, typer.Option(help="result file; build/bench/checkpointing-DEVICE.json unless set")
    ] = None,
) -> None:
    """What each mode of train.checkpointing costs in time and saves in memory, on one rank."""
    from jointfuse.bench.checkpointing import benchmark_checkpointing

    benchmark_checkpointing(recipe, overrides or [], steps, out, _console())


@app.command()
def data(
    corpus: Annotated[Path, typer.Option(help="folder of a corpus")],
    batch: Annotated[int, typer.Option(min=1, help="utterances in a batch")] = 32,
    workers: Annotated[
        list[int] | None, typer.Option(min=0, help="decoding processes; repeat the option; 0, 1 and 2 unless set")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="rounds; the fastest of each way counts")] = 3,
    out: Annotated[Path | None, typer.Option(help="result file; build/bench/data-DEVICE.json unless set")] = None,
) -> None:
    """An epoch of the training split: read and decoded, beside decoding alone and beside webdataset."""
    from jointfuse.bench.data import benchmark_data

    benchmark_data(corpus, batch, workers, repeats, out, _console())


@app.command()
def plan(
    utterances: Annotated[int, typer.Option(min=1, help="of a made-up index; 38 bytes each on disk")] = 10**7,
    shards: Annotated[int, typer.Option(min=1, help="tars, all of them empty")] = 10**4,
    batch: Annotated[int, typer.Option(min=1, help="utterances in a global batch")] = 1024,
    out: Annotated[Path | None, typer.Option(help="result file; build/bench/plan-DEVICE.json unless set")] = None,
) -> None:
    """The training order of a corpus of any size: time and memory of its first batch and of an epoch."""
    from jointfuse.bench.plan import benchmark_plan

    benchmark_plan(utterances, shards, batch, out, _console())


@app.command()
def build(
    clips: Annotated[int, typer.Option(min=1, help="synthetic ones, made in a scratch folder")] = 20_000,
    clip_seconds: Annotated[float, typer.Option(min=0.1, help="length of each")] = 3.0,
    rate: Annotated[int, typer.Option(min=8000, help="their sampling rate; 48000 is that of MELD")] = 48_000,
    media: Annotated[str, typer.Option(help="mp4, built as MELD, or wav, built from tables")] = "mp4",
    workers: Annotated[int | None, typer.Option(min=1, help="building processes; default: one a core")] = None,
    builds: Annotated[int, typer.Option(min=1, help="of everything, the plain loop in between; their mean counts")] = 3,
    out: Annotated[Path | None, typer.Option(help="result file; build/bench/build-DEVICE.json unless set")] = None,
) -> None:
    """Building a corpus from sound files, beside decoding and encoding them in a plain loop; and its memory."""
    from jointfuse.bench.build import benchmark_build

    benchmark_build(clips, clip_seconds, rate, media, workers, builds, out, _console())


@app.command()
def kernels(
    capability: Annotated[int, typer.Option(help="of the GPU they are compiled for: 80 or 90")] = 90,
    everything: Annotated[bool, typer.Option(help="every kernel x precision x tile x width")] = False,
    out: Annotated[
        Path | None, typer.Option(help="result file; build/bench/kernels-smNN-DEVICE.json unless set")
    ] = None,
) -> None:
    """The loss's kernels compiled without a GPU: registers, spills, instructions; and the loss's time on paper."""
    from jointfuse.bench.kernels import benchmark_kernels

    benchmark_kernels(capability, everything, out, _console())


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 130)


def main() -> None:
    try:
        app()
    except (ReadableError, OSError) as error:
        line, status = line_and_status(error)
        print(f"error: {line}", file=sys.stderr)
        sys.exit(status)


if __name__ == "__main__":
    main()
