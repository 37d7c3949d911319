"""The folder of a run: what was asked for, where it ran, what came of it.

RUN/config.yaml        resolved settings          RUN/checkpoints/   to resume from
RUN/environment.json   versions and devices       RUN/best/          the chosen model
RUN/metrics.jsonl      losses and dev scores      RUN/tokenizer/     where the model reads text
RUN/status             running, finished or stopped
RUN/tensorboard/           RUN/skipped.jsonl  with data.on_error=skip: what could not be read, and why
                           RUN/broken.jsonl   utterances of steps whose loss or gradient was not finite
                           RUN/batches/  with train.record_batches: a file a rank, the utterances of each micro-batch
"""

import json
import os
import platform
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from jointfuse.config import Config
from jointfuse.errors import UserError
from jointfuse.evaluate.history import read_metrics
from jointfuse.files import append_text, write_json, write_text

SKIPPED, BROKEN, BATCHES = "skipped.jsonl", "broken.jsonl", "batches"
RUNNING, FINISHED, STOPPED_EARLY = "running", "finished", "stopped"


def check_run_folder(run: Path, resume: bool) -> None:
    """Raises UserError: a run that exists and is not resumed, or one to resume that does not exist."""
    # A run whose config.yaml is gone goes on from a checkpoint, which has its settings.
    exists = (run / "config.yaml").exists() or any((run / "checkpoints").glob("step-*"))
    filled = run.exists() and any(run.iterdir())
    if resume and not exists:
        way_out = "choose another folder for a new run" if filled else "leave out --resume to start one"
        raise UserError(f"{run}: there is no run to resume here; {way_out}")
    if not resume and filled:
        way_out = "add --resume to go on with it, or choose another folder" if exists else "choose another folder"
        raise UserError(f"{run}: the folder exists and is not empty; {way_out}")


def create_run_folder(run: Path, config: Config, world_size: int) -> None:
    run.mkdir(parents=True, exist_ok=True)
    (run / "checkpoints").mkdir(exist_ok=True)
    packages = ("jointfuse", "torch", "deepspeed", "transformers", "timm", "webdataset", "numpy")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    environment = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "cores": os.cpu_count(),
        "ranks": world_size,
        "command": sys.argv,
        "packages": {name: version(name) for name in packages},
    }
    write_text(run / "config.yaml", config.to_yaml())
    write_json(run / "environment.json", environment)
    write_status(run, RUNNING)


def write_status(run: Path, status: str) -> None:
    """What becomes of a run, for whoever started it; written by rank 0."""
    write_text(run / "status", status + "\n")


def read_status(run: Path) -> str:
    """One of RUNNING, FINISHED and STOPPED_EARLY; empty where no run has begun."""
    try:
        return (run / "status").read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return ""


def note(path: Path, rows: list[dict[str, Any]]) -> None:
    """Every rank adds its own lines; a resumed run may write some a second time."""
    if rows:
        path.parent.mkdir(exist_ok=True)
        append_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


class MetricsLog:
    """RUN/metrics.jsonl and RUN/tensorboard; rows after `step` are dropped when a run resumes there."""

    def __init__(self, run: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = run / "metrics.jsonl"
        kept = [row for row in read_metrics(run) if row["step"] <= step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        if not step:
            shutil.rmtree(run / "tensorboard", ignore_errors=True)
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, kind: str, step: int, **figures: Any) -> None:
        append_text(self.path, json.dumps({"kind": kind, "step": step} | figures) + "\n")
        for name, value in figures.items():
            if isinstance(value, int | float):
                self.board.add_scalar(f"{kind}/{name}", value, step)
        self.board.flush()

    def close(self) -> None:
        self.board.close()
