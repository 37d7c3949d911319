"""Evaluation of a finished run: its chosen model over one split, scored and written up."""

from pathlib import Path
from typing import Any

import torch

from jointfuse.config import Config, validate
from jointfuse.data.mixture import AnyCorpus, AnySplit, open_data
from jointfuse.data.reader import UtteranceReader
from jointfuse.errors import UserError
from jointfuse.evaluate.history import read_metrics
from jointfuse.evaluate.metrics import Predictions, score
from jointfuse.evaluate.predict import predict
from jointfuse.evaluate.report import Hard, hardest, write_report
from jointfuse.files import read_yaml
from jointfuse.gpu import choose_kernels
from jointfuse.losses.gather import world_size
from jointfuse.model.export import load_model

HARDEST = 20  # utterances shown with text and clip


def evaluate_run(run: Path, split_name: str, corpus_path: str | None = None) -> dict[str, Any]:
    """Score RUN/best on a split and write RUN/eval-SPLIT (metrics.json, confusion.png, report.html) on rank 0.

    Every rank calls it where there are several; the result does not depend on their number.

    Args:
        corpus_path: another corpus, with some of the same labels; what the run was trained on unless set.

    Returns:
        The scores, see jointfuse.evaluate.metrics.score.

    Raises:
        UserError: no chosen model, no such split, or a corpus with a label that the model does not know.
    """
    if not (run / "best").is_dir():
        raise UserError(f"{run}: no chosen model here (RUN/best is missing); train first, or name another run folder")
    model = load_model(run / "best")
    data = model.config.data
    if corpus_path:
        data = data.model_copy(update={"corpus": corpus_path, "mix": [], "remote": "", "cache": ""})
    corpus = open_data(data, model.labels)
    split = corpus.split(split_name)
    network = model.network
    if torch.cuda.is_available():
        choose_kernels()
        network = network.cuda()
    reader = UtteranceReader(split, data, model.tokenizer, network.reads_audio, model.mel_mean, model.mel_deviation)
    predictions = predict(network, reader, data.workers)
    result = score(predictions.labels, predictions.logits.argmax(axis=1), model.labels)
    if world_size() == 1 or torch.distributed.get_rank() == 0:
        _write(run, model.config, corpus, split, predictions, result)
    return result


def _write(
    run: Path,
    config: Config,
    corpus: AnyCorpus,
    split: AnySplit,
    predictions: Predictions,
    result: dict[str, Any],
) -> None:
    settings = run / "config.yaml"
    if settings.exists():
        config = validate(
            read_yaml(settings, "it is written when a training starts; copy it from the run again"), str(settings)
        )
    write_report(
        run / f"eval-{split.name}",
        title=f"{config.recipe} · {_MODALITIES[config.model.modality]} · {corpus.name} {split.name}",
        settings_yaml=config.to_yaml(),
        corpus=corpus.info | {"split": split.name},
        score=result,
        names=corpus.labels,
        predictions=predictions,
        history=read_metrics(run),
        hard=[_hard(split, corpus.labels, predictions, int(i)) for i in hardest(predictions, HARDEST)],
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
