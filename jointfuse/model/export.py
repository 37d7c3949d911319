"""A trained model on disk: safetensors weights, JSON description, tokenizer. Nothing in it is ever unpickled.

FOLDER/model.safetensors   parameters of Network
FOLDER/model.json          settings, labels, backbones, mel statistics
FOLDER/tokenizer/          where the model reads text
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired

import torch
from pydantic import AfterValidator, Field
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase
from typing_extensions import TypedDict

from jointfuse.config import Config, validate
from jointfuse.data.records import Mel, checked
from jointfuse.data.tokenizer import read_tokenizer, write_tokenizer
from jointfuse.errors import UserError
from jointfuse.files import former, naming, read_json, replace_folder, write_json
from jointfuse.model.network import Network

FORMAT = 1
AGAIN = "copy the folder again or export the model again"


def _readable(format: int) -> int:
    if format != FORMAT:
        raise ValueError(f"format {format}, this version reads format {FORMAT}")
    return format


@checked
class Description(TypedDict):
    """model.json. `digests` are missing from what the first versions wrote."""

    format: Annotated[int, AfterValidator(_readable)]
    config: dict[str, Any]
    labels: Annotated[list[str], Field(min_length=1)]
    mel: Mel
    backbones: dict[str, dict[str, Any]]
    info: dict[str, Any]
    digests: NotRequired[dict[str, str]]


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
    with naming(partial / "model.safetensors"):
        save_file(state, partial / "model.safetensors")
    if tokenizer is not None:
        write_tokenizer(tokenizer, partial / "tokenizer")
    description = {
        "format": FORMAT,
        "config": config.model_dump(mode="json"),
        "labels": labels,
        "mel": {"mean": mel[0], "deviation": mel[1]},
        "backbones": network.descriptions,
        "info": info,
    }
    write_json(partial / "model.json", description | {"digests": _digests(description, partial)})
    replace_folder(partial, folder)


def load_model(folder: Path) -> Exported:
    """The model in `folder`, on the CPU, in float32 and in eval mode.

    Raises:
        UserError: the folder holds no model, or one that this version cannot read.
    """
    folder, description, state = _read_whole(folder)
    config = validate(description["config"], str(folder / "model.json"))
    network = Network(
        config.model,
        len(description["labels"]),
        config.data.max_tokens,
        config.data.max_seconds,
        descriptions=description["backbones"],
    )
    try:
        network.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    except RuntimeError as error:
        raise UserError(f"{folder}: model.safetensors does not fit model.json; export the model again") from error
    tokenizer = read_tokenizer(folder / "tokenizer", AGAIN) if network.reads_text else None
    mel = description["mel"]
    return Exported(
        network.eval(), config, description["labels"], mel["mean"], mel["deviation"], tokenizer, description["info"]
    )


def exported_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of an exported model. Raises UserError: the folder holds no model, or one that reads no text."""
    _read_description(folder)
    if not (folder / "tokenizer").is_dir():
        raise UserError(f"train.init_from: {folder} has no tokenizer, so that model reads no text; name another")
    return read_tokenizer(folder / "tokenizer", AGAIN)


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
    folder, description, state = _read_whole(folder)
    known: list[str] = description["labels"]
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


def _read_whole(folder: Path) -> tuple[Path, dict[str, Any], dict[str, torch.Tensor]]:
    """Where a model is at this instant, its description, and the weights that belong to it. Raises UserError."""
    place = former(folder) if former(folder).exists() and not folder.exists() else folder
    before = place.stat().st_ino if place.exists() else None
    try:
        description, state = _read_description(place), _read_weights(place)
        validate(description["config"], str(place / "model.json"), AGAIN)
        _check_digests(place, description)
    except UserError:
        if folder.exists() and folder.stat().st_ino != before:  # a training has put a better one there meanwhile
            return _read_whole(folder)
        raise
    return place, description, state


def _check_digests(folder: Path, description: dict[str, Any]) -> None:
    written = description.get("digests")
    if written is None:
        return
    for name, digest in _digests(description, folder).items():
        if written.get(name) != digest:
            raise UserError(f"{folder / name}: damaged, changed since the model was exported; {AGAIN}")


def _digests(description: dict[str, Any], folder: Path) -> dict[str, str]:
    """SHA-256 of the weights, and of what must be as it was for them to mean the same."""
    config = description["config"]
    read = [config["model"], *(config.get("data", {}).get(key) for key in ("max_tokens", "max_seconds"))]
    text = json.dumps([*read, *(description[key] for key in ("labels", "mel", "backbones"))])
    decisive = json.dumps(json.loads(text), sort_keys=True).encode()
    with (folder / "model.safetensors").open("rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    return {"model.json": hashlib.sha256(decisive).hexdigest(), "model.safetensors": weights}


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / "model.json"
    if not path.exists():
        raise UserError(f"{folder}: no exported model here (model.json is missing); name a RUN/best folder")
    return dict(read_json(path, Description, AGAIN))


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / "model.safetensors"
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing; {AGAIN}") from error
    except Exception as error:  # safetensors raises a type of its own
        raise UserError(f"{path}: damaged ({' '.join(str(error).split())}); {AGAIN}") from error
