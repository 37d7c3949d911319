"""A trained model on disk: safetensors weights, JSON description, tokenizer. Nothing in it is ever unpickled.

FOLDER/model.safetensors   parameters of Network
FOLDER/model.json          settings, labels, backbones, mel statistics
FOLDER/tokenizer/          where the model reads text
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from jointfuse.config import Config, validate
from jointfuse.errors import UserError
from jointfuse.model.network import Network

FORMAT = 1


@dataclass(frozen=True)
class Exported:
    """A model as it was chosen, and what it needs to read utterances the way it was trained to."""

    network: Network
    config: Config
    labels: list[str]
    mel_mean: float
    mel_deviation: float
    tokenizer: PreTrainedTokenizerBase | None
    info: dict[str, Any]  # step, epoch and dev score


def save_model(
    folder: Path,
    state: dict[str, torch.Tensor],
    network: Network,
    config: Config,
    labels: list[str],
    mel: tuple[float, float],
    tokenizer: PreTrainedTokenizerBase | None,
    info: dict[str, Any],
) -> None:
    """Write a model beside `folder`, then move it into place; a model that was there stays until then."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(state, partial / "model.safetensors")
    if tokenizer is not None:
        tokenizer.save_pretrained(partial / "tokenizer")
    description = {
        "format": FORMAT,
        "config": config.model_dump(mode="json"),
        "labels": labels,
        "mel": {"mean": mel[0], "deviation": mel[1]},
        "backbones": network.descriptions,
        "info": info,
    }
    (partial / "model.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def load_model(folder: Path) -> Exported:
    """The model in `folder`, on the CPU, in float32 and in eval mode.

    Raises:
        UserError: the folder holds no model, or one that this version cannot read.
    """
    description = _read_description(folder)
    config = validate(description["config"], str(folder / "model.json"))
    network = Network(
        config.model,
        len(description["labels"]),
        config.data.max_tokens,
        config.data.max_seconds,
        descriptions=description["backbones"],
    )
    state = _read_weights(folder)
    try:
        network.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    except RuntimeError as error:
        raise UserError(f"{folder}: model.safetensors does not fit model.json; export the model again") from error
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer") if network.reads_text else None
    mel = description["mel"]
    return Exported(
        network.eval(), config, description["labels"], mel["mean"], mel["deviation"], tokenizer, description["info"]
    )


def exported_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of an exported model. Raises UserError: the folder holds no model, or one that reads no text."""
    _read_description(folder)
    if not (folder / "tokenizer").is_dir():
        raise UserError(f"train.init_from: {folder} has no tokenizer, so that model reads no text; name another")
    return AutoTokenizer.from_pretrained(folder / "tokenizer")


def exported_mel(folder: Path) -> tuple[float, float]:
    """Mel mean and deviation that an exported model was trained with. Raises UserError: the folder holds no model."""
    mel = _read_description(folder)["mel"]
    return mel["mean"], mel["deviation"]


def initialise(network: Network, folder: Path, labels: list[str]) -> list[str]:
    """Start `network` from an exported model; its heads class by class, by name.

    Returns:
        The labels that the export does not know: their rows of the heads stay as they are.

    Raises:
        UserError: the export has other parts or other shapes.
    """
    known: list[str] = _read_description(folder)["labels"]
    state = _read_weights(folder)
    own = network.state_dict()
    shared = [label for label in labels if label in known]
    rows, theirs = ([names.index(label) for label in shared] for names in (labels, known))
    for name in state.keys() & own.keys():
        if "_head." in name and len(state[name]) == len(known):
            head = own[name].clone()
            head[rows] = state[name][theirs].to(head.dtype)
            state[name] = head
    odd = sorted(own.keys() ^ state.keys()) or sorted(n for n in own if own[n].shape != state[n].shape)
    if odd:
        raise UserError(
            f"train.init_from: {folder} was exported with other model settings ({len(odd)} parameters differ, "
            f"first {odd[0]}); its settings are in {folder / 'model.json'}"
        )
    network.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return [label for label in labels if label not in known]


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / "model.json"
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{folder}: no exported model here (model.json is missing); name a RUN/best folder") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: damaged, not valid JSON; export the model again") from error
    if description.get("format") != FORMAT:
        raise UserError(f"{path}: format {description.get('format')}, this version reads format {FORMAT}")
    return description


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / "model.safetensors"
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing; export the model again") from error
    except Exception as error:  # safetensors raises a type of its own
        raise UserError(f"{path}: damaged ({' '.join(str(error).split())}); export the model again") from error
