"""Evaluation of a finished run: its chosen model over one split, scored and written up."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from jointfuse.config import Config, validate
from jointfuse.data.mixture import AnySplit
from jointfuse.data.reader import UtteranceReader
from jointfuse.errors import UserError
from jointfuse.evaluate.history import read_metrics
from jointfuse.evaluate.metrics import Predictions, score, score_table
from jointfuse.evaluate.predict import predict
from jointfuse.evaluate.report import Hard, hardest, write_report
from jointfuse.evaluate.scored import Scored, open_scored
from jointfuse.files import former, read_yaml
from jointfuse.gpu import choose_kernels
from jointfuse.losses.gather import group_rank
from jointfuse.model.export import load_model

HARDEST = 20  # utterances shown with text and clip


class Evaluation(NamedTuple):
    scores: dict[str, Any]  # see jointfuse.evaluate.metrics.score
    folder: Path


def evaluate_run(
    run: Path, split_name: str, corpus_path: str | None = None, overrides: Sequence[str] = ()
) -> Evaluation:
    """Score RUN/best on a split and write metrics.json, confusion.png and report.html on rank 0, in a folder of the run
    that is of this corpus and split alone (see Scored.folder).

    Every rank calls it where there are several; the result does not depend on their number.

    Args:
        corpus_path: another corpus, with some of the same labels; what the run was trained on unless set.
        overrides: `section.key=value` of what jointfuse.evaluate.scored allows.

    Raises:
        UserError: no chosen model, no such split, a corpus with a label that the model does not know, or an override
            that is not allowed.
    """
    if not (run / "best").is_dir() and not former(run / "best").is_dir():
        raise UserError(f"{run}: no chosen model here (RUN/best is missing); train first, or name another run folder")
    model = load_model(run / "best")
    scored = open_scored(model.config, model.labels, model.info.get("corpus"), corpus_path, overrides)
    data, split = scored.settings, scored.corpus.split(split_name)
    network = model.network
    if torch.cuda.is_available():
        choose_kernels()
        network = network.cuda()
    reader = UtteranceReader(split, data, model.tokenizer, network.reads_audio, model.mel_mean, model.mel_deviation)
    predictions = predict(network, reader, data.workers)
    scores = score(predictions.labels, predictions.logits.argmax(axis=1), model.labels)
    if group_rank() == 0:
        _write(run, model.config, scored, split, predictions, scores)
    return Evaluation(scores, scored.folder(run, split_name))


def print_evaluation(evaluation: Evaluation) -> None:
    """The scores as a table, and where the report is."""
    console = Console()
    console.print(score_table(evaluation.scores))
    if absent := evaluation.scores["absent"]:
        console.print(f"no utterance of the split is {' or '.join(absent)}", soft_wrap=True, highlight=False)
    console.print(f"report: {evaluation.folder / 'report.html'}", soft_wrap=True, highlight=False)


def _write(
    run: Path,
    config: Config,
    scored: Scored,
    split: AnySplit,
    predictions: Predictions,
    scores: dict[str, Any],
) -> None:
    with (run / "best" / "model.safetensors").open("rb") as file:
        model = hashlib.file_digest(file, "sha256").hexdigest()
    identity = scored.identity(split.name) | {"model_sha256": model}
    settings = run / "config.yaml"
    if settings.exists():
        config = validate(
            read_yaml(settings, "it is written when a training starts; copy it from the run again"), str(settings)
        )
    labels = scored.corpus.labels
    write_report(
        scored.folder(run, split.name),
        title=f"{config.recipe} · {_MODALITIES[config.model.modality]} · {scored.corpus.name} {split.name}",
        settings_yaml=config.to_yaml(),
        corpus=scored.corpus.info | {"split": split.name},
        score=scores | identity,
        names=labels,
        predictions=predictions,
        history=read_metrics(run),
        hard=[_hard(split, labels, predictions, int(i)) for i in hardest(predictions, HARDEST)],
    )


_MODALITIES = {"both": "text + audio", "text": "text", "audio": "audio"}


def _hard(split: AnySplit, labels: list[str], predictions: Predictions, i: int) -> Hard:
    utterance = split.sample(i, audio=False)
    return Hard(
        key=utterance.key,
        text=utterance.text,
        speaker=utterance.speaker,
        dialogue=utterance.dialogue,
        turn=utterance.turn,
        label=labels[predictions.labels[i]],
        predicted=labels[predictions.predicted[i]],
        probability_of_truth=float(predictions.probability_of_truth[i]),
        flac=split.audio_bytes(i),
    )
