"""The command `jointfuse`."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from jointfuse.config import load_config, recipe_names
from jointfuse.errors import ReadableError, line_and_status

app = typer.Typer(
    help="Train and evaluate joint-vector fusion of text and speech for emotion recognition in conversation.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
Overrides = Annotated[list[str] | None, typer.Argument(help="settings as section.key=value", show_default=False)]
Recipe = Annotated[str, typer.Option(help="a recipe by name, or a path to a .yaml file")]
Ranks = Annotated[int, typer.Option(min=1, help="processes on this machine, one a GPU")]
NumberOfNodes = Annotated[int, typer.Option("--nodes", min=1, help="machines; the command runs on each of them")]
NodeRank = Annotated[int, typer.Option(help="which of them this is, from 0")]
MELD = "4710,1743,1205,1109,683,271,268"  # its training utterances
Master = Annotated[str, typer.Option(help="HOST:PORT at which node 0 is reached", show_default=False)]


@app.command()
def train(
    recipe: Recipe,
    run: Annotated[Path, typer.Option(help="folder of the run, made by this command")],
    ranks: Ranks = 1,
    nodes: NumberOfNodes = 1,
    node_rank: NodeRank = 0,
    master: Master = "",
    resume: Annotated[bool, typer.Option("--resume", help="go on from the run's latest checkpoint")] = False,
    overrides: Overrides = None,
) -> None:
    """Train a recipe through the DeepSpeed launcher.

    USR2, TERM or Ctrl-C: every rank saves after the step it is at, and --resume goes on from there. Exit status: 0
    finished, 2 a mistake in settings or data, 3 stopped when asked to; anything else is a fault, 75 one that may pass.
    """
    from jointfuse.interruption import end_when_asked
    from jointfuse.launch import Nodes, check_train, launch_training

    end_when_asked()
    config = load_config(recipe, overrides or [])
    placed = Nodes(nodes, node_rank, master)
    check_train(config, run, resume, ranks * nodes)
    raise typer.Exit(launch_training(recipe, overrides or [], run, resume, ranks, placed))


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="folder of a run")],
    split: Annotated[str, typer.Option(help="split of the corpus")] = "test",
    corpus: Annotated[str | None, typer.Option(help="another corpus, with some of the same labels")] = None,
    ranks: Ranks = 1,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="data.labels and the like as section.key=value", show_default=False)
    ] = None,
) -> None:
    """Score the chosen model of a run and write a report page."""
    from jointfuse.evaluate.run import evaluate_run, print_evaluation
    from jointfuse.launch import launch_evaluation

    if ranks > 1:
        raise typer.Exit(launch_evaluation(run, split, corpus, overrides or [], ranks))
    print_evaluation(evaluate_run(run, split, corpus, overrides or []))


@app.command()
def compare(
    recipe: Recipe,
    out: Annotated[Path, typer.Option(help="folder of the experiment; runs it already holds are not repeated")],
    ranks: Ranks = 1,
    seeds: Annotated[int, typer.Option(min=1, help="trainings a model; 3 or more for a figure to be quoted")] = 1,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="train runs of other settings or another corpus anew; the old ones stay")
    ] = False,
    overrides: Overrides = None,
) -> None:
    """Train and score text alone, audio alone and both."""
    from jointfuse.experiments.modalities import compare_modalities

    compare_modalities(recipe, overrides or [], out, ranks, seeds, Console(), retrain)


@app.command()
def plan(
    recipe: Recipe,
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="ranks of a node")] = 1,
    tflops: Annotated[
        float | None, typer.Option(min=0.001, help="10^12 operations a second of a GPU in large matrix products")
    ] = None,
    share: Annotated[float, typer.Option(min=0.01, max=1, help="of that rate, what a whole step reaches")] = 0.5,
    bandwidth: Annotated[float | None, typer.Option(min=0.001, help="10^9 bytes a second that leave a GPU")] = None,
    counts: Annotated[str, typer.Option(help="utterances of each class, where data.corpus is not set")] = MELD,
    device: Annotated[Literal["gpu", "cpu"], typer.Option(help="that trains")] = "gpu",
    overrides: Overrides = None,
) -> None:
    """Memory, bytes on the wire, time of a step and the contrastive pool, before anything is trained.

    A rate that is not given is measured on this machine.
    """
    from jointfuse.capacity.corpus import read_counts
    from jointfuse.capacity.plan import plan_recipe
    from jointfuse.capacity.tables import print_plan

    config = load_config(recipe, overrides or [])
    made = plan_recipe(config, nodes * gpus_per_node, device, read_counts(counts), tflops, bandwidth, share)
    print_plan(made, Console(width=None if sys.stdout.isatty() else 100))


@app.command()
def doctor(
    run: Annotated[Path, typer.Option(help="folder of a run, there already or to come")],
    ranks: Ranks = 1,
    nodes: NumberOfNodes = 1,
    node_rank: NodeRank = 0,
    master: Master = "",
) -> None:
    """Look at what a job needs before it starts: versions, devices, connections between nodes, disk."""
    from jointfuse.doctor import examine
    from jointfuse.launch import Nodes

    examine(run, ranks, Nodes(nodes, node_rank, master), Console())


@app.command()
def show(recipe: Recipe, overrides: Overrides = None) -> None:
    """Print the resolved settings of a recipe."""
    print(load_config(recipe, overrides or []).to_yaml(), end="")


@app.command()
def recipes() -> None:
    """List the recipes."""
    print("\n".join(recipe_names()))


def main() -> None:
    """Run the command line. A user's mistake is one line and exit status 2, a disk that is away one line and 75."""
    try:
        app()
    except (ReadableError, OSError) as error:
        line, status = line_and_status(error)
        print(f"error: {line}", file=sys.stderr)
        sys.exit(status)
