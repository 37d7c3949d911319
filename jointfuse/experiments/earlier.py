"""Runs that an experiment finds in its folder: whether they are of the settings and the corpus it is about."""

import json
from pathlib import Path

from pydantic import BaseModel

from jointfuse.config import Config, changed_keys, validate
from jointfuse.errors import UserError
from jointfuse.files import read_json, read_yaml
from jointfuse.train.checkpoint import FREE
from jointfuse.train.deepspeed_file import read_deepspeed_file

# Settings that a run may change while it goes on, and that decide which model comes out of it.
DECIDING = {"train.steps", "train.epochs", "train.evaluate_every", "train.patience"}
WAY_OUT = "delete the run's folder, or choose another --out"


def difference(run: Path, wanted: Config, digest: str) -> str:
    """What a run was trained with that is not wanted now, in words; empty where it is the run that is wanted, or none
    has begun.

    Args:
        digest: of the corpus that is wanted.

    Raises:
        UserError: its files cannot be read.
    """
    path = run / "config.yaml"
    if not path.exists():
        return ""
    trained = validate(read_yaml(path, WAY_OUT), str(path))
    changed = {key: values for key, values in changed_keys(trained, wanted).items() if key not in FREE - DECIDING}
    if _precision(trained) != _precision(wanted):
        changed["train.deepspeed"] = (trained.train.deepspeed, wanted.train.deepspeed)
    if changed:
        key, (old, new) = next(iter(changed.items()))
        more = f" and {len(changed) - 1} more settings" if len(changed) > 1 else ""
        return f"with {key} = {old!r}, where {new!r} is asked for{more}"
    known = _corpus(run)
    if known and known != digest:
        return f"on another corpus than {wanted.data.corpus or 'those of data.mix'} is now"
    return ""


def free_name(run: Path) -> Path:
    """Where a run that makes room for another is kept: RUN.old-1, or the first number that is free."""
    number = 1
    while (free := run.with_name(f"{run.name}.old-{number}")).exists():
        number += 1
    return free


def where(run: Path, wanted: Config) -> tuple[str | None, list[str]]:
    """The corpus and the overrides with which a run is scored, where its corpus has moved since."""
    path = run / "config.yaml"
    trained, data = validate(read_yaml(path, WAY_OUT), str(path)).data, wanted.data
    if not data.corpus or (data.corpus, data.remote, data.cache) == (trained.corpus, trained.remote, trained.cache):
        return None, []
    moved = {name: json.dumps(getattr(data, name)) for name in ("remote", "cache") if getattr(data, name)}
    return data.corpus, [f"data.{name}={value}" for name, value in moved.items()]


def _precision(config: Config) -> str:
    """Of the arithmetic, as the file says that train.deepspeed names; the name where there is no such file any more."""
    try:
        return read_deepspeed_file(config.train).precision
    except UserError:
        return config.train.deepspeed


def _corpus(run: Path) -> str:
    """Digest of the corpus that a run was trained on; empty before it has saved or chosen anything."""
    model = run / "best" / "model.json"
    if model.exists() and (digest := read_json(model, _Model, WAY_OUT).info.corpus):
        return digest
    positions = sorted((run / "checkpoints").glob("step-*/position.json"))
    return read_json(positions[-1], _OfCorpus, WAY_OUT).corpus if positions else ""


class _OfCorpus(BaseModel):
    corpus: str = ""


class _Model(BaseModel):
    info: _OfCorpus
