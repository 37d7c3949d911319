"""The folder of a run: what was asked for, where it ran, what came of it.

RUN/config.yaml        resolved settings          RUN/checkpoints/   to resume from
RUN/environment.json   versions and devices       RUN/best/          the chosen model
RUN/metrics.jsonl      losses and dev scores      RUN/tokenizer/     where the model reads text
RUN/status             running, finished or stopped
RUN/lock, RUN/holder.json  held while a training works on it, and by whom: hold.py
RUN/tensorboard/           RUN/skipped.jsonl  with data.on_error=skip: what could not be read, and why
                           RUN/broken.jsonl   utterances of steps whose loss or gradient was not finite
                           RUN/batches/  with train.record_batches: a file a rank, the utterances of each micro-batch
"""

import json
import os
import platform
import shutil
import socket
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from jointfuse.config import Config
from jointfuse.errors import UserError
from jointfuse.evaluate.history import read_metrics
from jointfuse.files import append_text, write_json, write_text
from jointfuse.train.hold import HOLDER, LOCK, holder_of, is_held

SKIPPED, BROKEN, BATCHES = "skipped.jsonl", "broken.jsonl", "batches"
RUNNING, FINISHED, STOPPED_EARLY, DIED = "running", "finished", "stopped", "died"


def check_run_folder(run: Path, resume: bool) -> None:
    """Raises UserError: a run that exists and is not resumed, or one to resume that does not exist."""
    # A run whose config.yaml is gone goes on from a checkpoint, which has its settings.
    exists = (run / "config.yaml").exists() or any((run / "checkpoints").glob("step-*"))
    filled = run.exists() and bool({path.name for path in run.iterdir()} - {LOCK, HOLDER})
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
    """One of RUNNING, FINISHED, STOPPED_EARLY and DIED; empty where no run has begun.

    Not for the process that trains it. DIED is what nothing holds any more that was to be running; where a file system
    does not carry locks between machines, that is also what runs on another one.
    """
    if not (run / "status").exists():
        return ""
    status = (run / "status").read_text(encoding="utf-8", errors="replace").strip()  # damaged, it must not end a resume
    return DIED if status == RUNNING and not is_held(run) else status


def describe_run(run: Path) -> str:
    """What has become of a run, and whether it can be resumed, in one line; empty where no run has begun."""
    status = read_status(run)
    if not status:
        return ""
    holder, step = holder_of(run), max((row["step"] for row in read_metrics(run)), default=0)
    where = f" {holder}" if holder else ""
    elsewhere = holder is not None and holder.host != socket.gethostname()
    unless = " (unless its disk carries no locks between machines)" if elsewhere else ""
    return f"{run}: " + {
        RUNNING: f"is running{where}, at step {step}",
        DIED: f"was running{where} and died after step {step}{unless}; --resume goes on from its last checkpoint",
        STOPPED_EARLY: f"stopped after step {step} when asked to; --resume goes on from there",
        FINISHED: f"finished at step {step}; with more train.epochs or train.steps, --resume trains it for longer",
    }.get(status, f"status {status!r}")


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
