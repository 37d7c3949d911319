"""Which checkpoint of a run is whole: the newest one, or, where that one is damaged, the one before it.

A file of torch is a zip archive: its directory, at its end, tells a file that was cut off without a look at the rest,
and its sums tell what has changed since it was written.
"""

import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch.distributed as dist
from pydantic import ConfigDict, Field

from jointfuse.config import Config, validate
from jointfuse.errors import UserError
from jointfuse.files import read_json, read_text, read_yaml
from jointfuse.train.engine import Layout
from jointfuse.train.resize import state_files

STEP = re.compile(r"step-\d{8,20}")
ANOTHER = "resume from another checkpoint of the run"
Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


@dataclass
class Position:
    """Where a run stands. The order of utterances and the learning rate follow from it."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid", strict=True)

    epoch: Count = 0
    batch: Count = 0  # batches of this epoch that are done
    step: Count = 0
    best_score: Finite = -1.0
    best_step: Annotated[int, Field(ge=-1, le=2**63 - 1)] = -1
    evaluations_without_better: Count = 0
    steps: Count = 0  # of the whole run, as it was to be; 0: an older checkpoint, which does not say
    warmup: Count = 0  # steps of it, of the length that the run began with
    world_size: Annotated[int, Field(ge=1, le=2**31)] = 1  # this and the next three: the layout of DeepSpeed's files
    stage: Annotated[int, Field(ge=0, le=3)] = 0
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    files: str = ""
    corpus: str = ""  # digest of corpus.json: the order of utterances is a function of the corpus, wherever it lies
    mel: Annotated[list[Finite], Field(min_length=2, max_length=2)] | None = None  # mean and deviation, if another's

    @property
    def layout(self) -> Layout:
        return Layout(self.world_size, self.stage, self.precision, self.files)


def read_position(checkpoint: Path) -> Position:
    """Raises UserError where it is missing, damaged, or of another version."""
    return read_json(checkpoint / "position.json", Position, ANOTHER)


def read_settings(checkpoint: Path) -> Config:
    """The settings that a checkpoint was written under. Raises UserError."""
    path = checkpoint / "config.yaml"
    return validate(read_yaml(path, ANOTHER), str(path), ANOTHER)


def latest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run whose files are there and end where they should; None where it has none.

    Raises:
        UserError: none of those there are is whole.
    """
    faults = _odd_latest(run)
    for checkpoint in _checkpoints(run):
        if not (fault := _fault(checkpoint, 0, 0)):
            return checkpoint
        faults.append(fault)
    _refuse(run, faults)
    return None


def agreed_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a run of which every byte is as it was written, and what is wrong with newer ones.

    Every rank calls it; the ranks share the reading, and all get the same answer.

    Raises:
        UserError: none of those there are is whole.
    """
    seen: list[Any] = [(_odd_latest(run), _checkpoints(run))] if dist.get_rank() == 0 else [None]
    dist.broadcast_object_list(seen)  # a shared disk may show each machine another list
    faults, checkpoints = seen[0]
    for checkpoint in checkpoints:
        found: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(found, _fault(checkpoint, dist.get_rank(), len(found)))
        if not any(found):
            return checkpoint, faults
        faults.append(next(fault for fault in found if fault))
    _refuse(run, faults)
    return None, []


def _refuse(run: Path, faults: list[str]) -> None:
    if faults:
        more = f" (and so are {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise UserError(
            f"{faults[0]}: no whole checkpoint is left{more}; start a new run in another folder, from the chosen model "
            f"with train.init_from={run / 'best'} where there is one"
        )


def _named(run: Path) -> str | None:
    path = run / "checkpoints" / "latest"
    return read_text(path, "").strip() if path.exists() else None


def _odd_latest(run: Path) -> list[str]:
    """What is wrong with `latest` itself, if anything."""
    path = run / "checkpoints" / "latest"
    try:
        name = _named(run)
    except UserError:
        return [f"{path} cannot be read"]
    if name is None or (STEP.fullmatch(name) and (path.parent / name).is_dir()):
        return []
    return [f"{path} names {name[:80]!r}, which is not there"]


def _checkpoints(run: Path) -> list[Path]:
    """Newest first, from the one that `latest` names: a run that went on from an older one has left the others."""
    folder = run / "checkpoints"
    steps = sorted((path for path in folder.glob("step-*") if STEP.fullmatch(path.name)), reverse=True)
    return steps if _odd_latest(run) else [path for path in steps if path.name <= (_named(run) or path.name)]


def _fault(checkpoint: Path, rank: int, ranks: int) -> str | None:
    """The first thing wrong with a checkpoint, None where it is whole.

    Args:
        ranks: of so many, each reads every byte of its share of the files; 0: nobody does.
    """
    try:
        read_settings(checkpoint)
        files = state_files(checkpoint, read_position(checkpoint).layout)
    except UserError as error:
        return str(error).removesuffix(f"; {ANOTHER}")
    for number, path in enumerate(files):
        if fault := _file_fault(path, whole=bool(ranks) and number % ranks == rank):
            return fault
    return None


def _file_fault(path: Path, whole: bool) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            return f"{path}: damaged, changed since it was written" if whole and archive.testzip() else None
    except OSError as error:
        return f"{path}: {error.strerror or 'cannot be read'}"
    except Exception:  # an archive that is none raises many kinds
        return f"{path}: damaged or cut off"
