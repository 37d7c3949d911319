"""Text alone, audio alone and both: the same recipe three times, over several seeds, chosen on dev, scored on test."""

import time
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from jointfuse.config import Config, load_config
from jointfuse.errors import EndedError, PassingFault, UserError
from jointfuse.evaluate.metrics import HEADLINES, summary_table
from jointfuse.evaluate.report import write_comparison
from jointfuse.evaluate.run import evaluate_run
from jointfuse.files import write_json
from jointfuse.interruption import STOPPED
from jointfuse.launch import check_train, launch_training
from jointfuse.lock import Lock

MODALITIES = {"text": "text", "audio": "audio", "both": "text + audio"}


def compare_modalities(
    recipe: str, overrides: list[str], out: Path, ranks: int, seeds: int, console: Console, retrain: bool = False
) -> dict[str, Any]:
    """Train and score every modality with seeds 0 to `seeds` - 1; write OUT/results.json and OUT/comparison.html.

    A run of OUT that is finished is not trained again, one that was interrupted is resumed; both only where they are of
    these settings and this corpus.

    Args:
        retrain: train what is of others anew; it is kept as RUN.old-N.

    Returns:
        results.json: for each modality its test scores by seed, and their mean and deviation.

    Raises:
        UserError: bad settings, or runs of other settings or of another corpus.
        PassingFault: another comparison works here.
        EndedError: a training failed or was stopped.
    """
    from jointfuse.data.mixture import corpus_digest, open_for_training
    from jointfuse.experiments.earlier import difference, free_name, where

    corpus = open_for_training(load_config(recipe, overrides).data)
    corpus.split("test")  # missing, it would be noticed only after a training
    out.mkdir(parents=True, exist_ok=True)
    lock = Lock(out)  # until this function ends
    if not lock.take():
        raise PassingFault(f"{out}: another comparison works here; wait for it or choose another --out")
    runs = []
    for seed in range(seeds):
        for modality in MODALITIES:
            settings = [*overrides, f"model.modality={modality}", f"train.seed={seed}"]
            config = load_config(recipe, settings)
            folder = out / f"{modality}-seed{seed}"
            why = difference(folder, config, corpus_digest(corpus))
            runs.append(_Run(folder, modality, seed, settings, config, why))
    others = [run for run in runs if run.other]
    if others and not retrain:
        first, more = others[0], f" ({len(others) - 1} more runs likewise)" if len(others) > 1 else ""
        raise UserError(
            f"{first.folder} was trained {first.other}{more}; add --retrain to train anew what differs (the old run "
            f"stays, as {free_name(first.folder).name}), or choose another --out"
        )
    scores: dict[str, list[dict[str, Any]]] = {name: [] for name in MODALITIES}
    seconds: dict[str, float] = {}
    for run in runs:
        started = time.monotonic()
        if _trained_now(recipe, run, ranks, console):
            seconds[run.folder.name] = round(time.monotonic() - started, 1)
        scores[run.modality].append(evaluate_run(run.folder, "test", *where(run.folder, run.config)).scores)
    return _report(out, recipe, scores, seconds, console)


class _Run(NamedTuple):
    """A training of the comparison."""

    folder: Path
    modality: str
    seed: int
    settings: list[str]  # overrides
    config: Config
    other: str  # what the run in the folder was trained with that is not wanted now, in words


def _trained_now(recipe: str, run: _Run, ranks: int, console: Console) -> bool:
    """Train a run, to its end or from where it was interrupted; false: it is finished already."""
    from jointfuse.experiments.earlier import free_name
    from jointfuse.train.run_folder import FINISHED, read_status

    if not run.other and read_status(run.folder) == FINISHED:
        return False
    console.rule(f"{MODALITIES[run.modality]}, seed {run.seed}")
    aside = free_name(run.folder)
    resume = not run.other and (run.folder / "config.yaml").exists()
    # Into a free folder first: what cannot start leaves the old run in its place.
    check_train(run.config, aside if run.other else run.folder, resume, ranks)
    if run.other:
        run.folder.rename(aside)
        console.print(f"{run.folder} was trained {run.other}: it is {aside} now", soft_wrap=True, highlight=False)
    status = launch_training(recipe, run.settings, run.folder, resume, ranks, brief=True)
    if status:
        ending = "stopped when asked to" if status == STOPPED else "training failed, see the lines above"
        raise EndedError(f"{run.folder}: {ending}; the same command goes on from there", status)
    return True


def _report(
    out: Path,
    recipe: str,
    scores: dict[str, list[dict[str, Any]]],
    seconds: dict[str, float],
    console: Console,
) -> dict[str, Any]:
    names = scores["both"][0]["names"]
    seeds = len(scores["both"])
    reports = {title: out / f"{name}-seed0" / "eval-test" / "report.html" for name, title in MODALITIES.items()}
    results: dict[str, Any] = {"recipe": recipe, "seeds": seeds, "train_seconds": seconds, "models": {}}
    for name, runs in scores.items():
        results["models"][name] = {
            key: dict(zip(("mean", "deviation"), _mean_and_deviation([run[key] for run in runs]), strict=True))
            | {"seeds": [run[key] for run in runs]}
            for key in HEADLINES
        }
    write_json(out / "results.json", results)
    page = write_comparison(
        out,
        {title: scores[name][0] for name, title in MODALITIES.items()},
        names,
        reports,
        f"{recipe}: text, audio and both",
        "Chosen on dev, scored on test, seed 0." if seeds == 1 else _in_words(results),
    )
    console.print(summary_table({title: scores[name][0] for name, title in MODALITIES.items()}))
    if seeds > 1:
        console.print(_seeds_table(results))
    console.print(_confusion_table(scores["both"][0], names))
    console.print(f"report: {reports['text + audio']}\ncomparison: {page}", soft_wrap=True, highlight=False)
    return results


def _mean_and_deviation(values: list[float]) -> tuple[float, float]:
    """Mean and sample deviation; a single value has deviation 0."""
    mean = sum(values) / len(values)
    spread = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    return mean, spread**0.5


def _in_words(results: dict[str, Any]) -> str:
    parts = [
        f"{title} {figures['weighted_f1']['mean']:.3f} ± {figures['weighted_f1']['deviation']:.3f}"
        for name, title in MODALITIES.items()
        for figures in [results["models"][name]]
    ]
    return f"Weighted F1 on test, mean and deviation of {results['seeds']} seeds: {'; '.join(parts)}. Below: seed 0."


def _seeds_table(results: dict[str, Any]) -> Table:
    table = Table(title=f"test, mean ± deviation of {results['seeds']} seeds")
    table.add_column("model")
    for heading in HEADLINES.values():
        table.add_column(heading, justify="right")
    for name, title in MODALITIES.items():
        cells = (results["models"][name][key] for key in HEADLINES)
        table.add_row(title, *(f"{cell['mean']:.3f} ± {cell['deviation']:.3f}" for cell in cells))
    return table


def _confusion_table(score: dict[str, Any], names: list[str]) -> Table:
    table = Table(title="text + audio, seed 0: rows are the truth, columns the answers")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for name, row in zip(names, score["confusion"], strict=True):
        table.add_row(name, *(str(count) if count else "·" for count in row))
    return table
