"""What a training starts from, besides its weights: the tokenizer and the mel statistics."""

import hashlib
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from jointfuse.config import Config
from jointfuse.data.mixture import AnyCorpus
from jointfuse.data.tokenizer import read_tokenizer, train_tokenizer
from jointfuse.errors import UserError
from jointfuse.losses.gather import gather_numbers
from jointfuse.model.backbones import pretrained_tokenizer
from jointfuse.model.export import exported_mel, exported_tokenizer


def splits_read(config: Config, corpus: AnyCorpus) -> list[str]:
    """The splits that a training reads: train, and dev where the corpus has one.

    Raises:
        UserError: there is no train, or no dev where the model is chosen on it.
    """
    if "dev" in corpus.splits:
        return ["train", "dev"]
    if config.train.choose_by != "last":
        raise UserError(
            f"{corpus.path}: no split 'dev' to choose the model on by {config.train.choose_by}; there are "
            f"{', '.join(corpus.splits)}; train.choose_by=last takes the model at the end and needs none"
        )
    return ["train"]


def starting_mel(config: Config, corpus: AnyCorpus) -> tuple[float, float]:
    """Mean and deviation that clips are normalised by: those that the weights have learnt, else the corpus's own."""
    if config.train.init_from and config.model.modality != "text":
        return exported_mel(Path(config.train.init_from))
    return corpus.mel_mean, corpus.mel_deviation


def starting_tokenizer(
    config: Config, run: Path, corpus: AnyCorpus
) -> tuple[PreTrainedTokenizerBase | None, list[str]]:
    """The run's own where it has one already, that of the model it starts from, that of pretrained weights, or one
    learnt from the training texts; None where the model reads none. Every rank calls it.

    Returns:
        The tokenizer, and with `data.on_error: skip` why texts could not be read that it then has not learnt from.

    Raises:
        UserError: there is none to be had.
    """
    encoder = config.model.text_encoder
    if config.model.modality == "audio":
        return None, []
    if (run / "tokenizer").exists():
        return read_tokenizer(run / "tokenizer", "delete the folder, and it is made again"), []
    if config.train.init_from:
        return exported_tokenizer(Path(config.train.init_from)), []
    if not encoder.scratch:
        return pretrained_tokenizer(encoder, "model.text_encoder.weights"), []
    split, unreadable = corpus.split("train"), list[str]()
    if config.data.on_error == "fail":
        return train_tokenizer(split, encoder.scratch.vocabulary), []
    tokenizer = train_tokenizer(split, encoder.scratch.vocabulary, unreadable)
    if len(unreadable) > config.data.most_skipped * len(split):
        raise UserError(
            f"{len(unreadable)} of {len(split)} texts cannot be read, more than data.most_skipped = "
            f"{config.data.most_skipped}; the first: {unreadable[0]}"
        )
    _require_one_tokenizer(tokenizer)
    return tokenizer, unreadable


def _require_one_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Ranks on which other texts could not be read have learnt other tokens."""
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).digest()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    number = torch.tensor([int.from_bytes(digest[:6])], dtype=torch.float64, device=device)
    if len({own for (own,) in gather_numbers(number)}) > 1:
        raise UserError(
            "the texts that can be read are not the same on all ranks, and so are the tokenizers learnt from them; "
            "see that every machine reads the whole corpus, and start again"
        )
