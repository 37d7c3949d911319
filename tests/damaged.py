"""A run that has checkpoints without a training, and files that are not as they were."""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from jointfuse.config import Config
from jointfuse.data.mixture import corpus_digest
from jointfuse.data.shards import Corpus
from jointfuse.files import write_json, write_text
from jointfuse.train.deepspeed_file import read_deepspeed_file
from jointfuse.train.engine import layout
from jointfuse.train.resize import state_files
from jointfuse.train.whole import Position


def write_run(run: Path, config: Config, corpus: Path, steps: tuple[int, ...]) -> None:
    """A run of two ranks with a checkpoint of each of `steps`, with files of torch where DeepSpeed's are."""
    here = layout(read_deepspeed_file(config.train), world_size=2)
    digest = corpus_digest(Corpus.open(corpus))
    for step in steps:
        checkpoint = run / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        write_json(checkpoint / "position.json", asdict(Position(step=step, corpus=digest, **asdict(here))))
        write_text(checkpoint / "config.yaml", config.to_yaml())
        for path in state_files(checkpoint, here):
            torch.save({"weights": torch.arange(50.0)}, path)
    write_text(run / "checkpoints" / "latest", f"step-{steps[-1]:08d}\n")
    write_text(run / "config.yaml", config.to_yaml())
    write_text(run / "status", "running\n")
    row = {"kind": "train", "loss": 1.0}
    write_text(run / "metrics.jsonl", "".join(json.dumps(row | {"step": step}) + "\n" for step in steps))


def flip(path: Path, at: int) -> None:
    """One bit, none of the bytes moved."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
