"""Checkpoints of a run: written beside, renamed, and only then named by `latest`.

RUN/checkpoints/step-00000120/   DeepSpeed's state, position.json, config.yaml
RUN/checkpoints/latest           the name of the newest complete one
"""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from jointfuse.config import Config, changed_keys
from jointfuse.data.mixture import AnyCorpus, corpus_digest
from jointfuse.errors import UserError
from jointfuse.files import replace_folder, write_json, write_text
from jointfuse.train.deepspeed_file import read_deepspeed_file
from jointfuse.train.engine import Layout, layout
from jointfuse.train.resize import check_resize, load_resized
from jointfuse.train.whole import Position, read_position, read_settings
from jointfuse.train.writer import Writer

# Settings that may differ between a checkpoint and the run that resumes it: none of them changes a
# number while all utterances can be read, but for the last digits where a step is divided in another way.
FREE = {
    "data.workers",
    "data.corpus",
    "data.mix",  # corpora and weights are in the digest
    "data.remote",
    "data.cache",
    "data.cache_gib",
    "data.verify",
    "data.on_error",
    "data.patience",
    "data.most_skipped",
    "train.deepspeed",
    "train.micro_batch",
    "train.keep_checkpoints",
    "train.save_async",
    "train.most_broken",
    "train.longest_step",
    "train.save_every",
    "train.log_every",
    "train.record_batches",
    "train.evaluate_every",  # which models may be chosen, and nothing of the training
    "train.patience",
    "recipe",
}
LENGTHS = ("train.epochs", "train.steps")  # may grow


class Checkpoints:
    """The checkpoints that a run writes; every rank calls every method.

    Args:
        engine: of DeepSpeed; its files are written by a Writer from now on.
        run: folder of the run.
    """

    def __init__(self, engine: Any, run: Path, config: Config) -> None:
        self.engine, self.folder, self.config = engine, run / "checkpoints", config
        self.writer = engine.checkpoint_engine = Writer(config.train.save_async)
        self.first = dist.get_rank() == 0
        self._begun: str | None = None
        if self.first:
            for partial in self.folder.glob(".step-*"):  # of a run that died while it saved
                shutil.rmtree(partial, ignore_errors=True)

    def save(self, position: Position) -> None:
        """Begin a checkpoint, and end it too unless `train.save_async`.

        Raises:
            OSError: it cannot be written; the one before it is untouched.
        """
        self.finish()
        name = f"step-{position.step:08d}"
        partial = self.folder / f".{name}.partial"
        # DeepSpeed would write `latest` on rank 0 before the other ranks have finished.
        self.engine.save_checkpoint(str(self.folder), tag=partial.name, save_latest=False)
        if self.first:
            write_json(partial / "position.json", asdict(position))
            write_text(partial / "config.yaml", self.config.to_yaml())
        self._begun = name
        if not self.config.train.save_async:
            self.finish()

    @property
    def busy(self) -> bool:
        """Whether this rank has files to write still."""
        return self.writer.busy

    def finish(self) -> None:
        """Wait for the checkpoint that was begun last and name it; older ones than `train.keep_checkpoints` go then."""
        if self._begun is None:
            return
        self.writer.finish()
        dist.barrier()
        name, self._begun = self._begun, None
        if self.first:
            replace_folder(self.folder / f".{name}.partial", self.folder / name)
            write_text(self.folder / "latest", name + "\n")
            # Later ones are of steps that a run does again: it went on from before them, since they were damaged.
            there = sorted(self.folder.glob("step-*"))
            kept = [path for path in there if path.name <= name][-self.config.train.keep_checkpoints :]
            for other in there:
                if other not in kept:
                    shutil.rmtree(other)
        dist.barrier()


def check_resumable(checkpoint: Path, config: Config, world_size: int, corpus: AnyCorpus) -> Position:
    """The position in a checkpoint that this run may go on from.

    Raises:
        UserError: the checkpoint was written under other settings or on another corpus, or it cannot be converted to
            the layout of this run.
    """
    written = read_settings(checkpoint)
    changed = {key: values for key, values in changed_keys(written, config).items() if not _may_change(key, *values)}
    if changed:
        each = "; ".join(f"{key} = {old!r} there, {new!r} here" for key, (old, new) in changed.items())
        longer = ", which may only grow" if changed.keys() & set(LENGTHS) else ""
        raise UserError(
            f"{checkpoint} was written with other settings: {each}{longer}; resume with the settings of the run "
            f"(--recipe {checkpoint.parents[1] / 'config.yaml'}), or start a new run"
        )
    position = read_position(checkpoint)
    if not position.steps:
        train = written.train
        epochs = (train.epochs or 0) * -(-len(corpus.split("train")) // train.batch)
        position.steps = train.steps or epochs
        position.warmup = round(train.warmup * position.steps)
    if position.corpus != corpus_digest(corpus):
        raise UserError(
            f"{checkpoint} was written on another corpus than {corpus.path}; resume with the corpus of the run"
        )
    check_resize(checkpoint, written, position.layout, config, layout(read_deepspeed_file(config.train), world_size))
    return position


def _may_change(key: str, old: Any, new: Any) -> bool:
    return key in FREE or (key in LENGTHS and None not in (old, new) and new > old)


def load_checkpoint(engine: Any, checkpoint: Path, before: Layout, now: Layout) -> None:
    """Every rank calls it, after check_resumable. Reads only what this run's own ranks wrote.

    Args:
        before: layout of the checkpoint.
        now: layout of the engine.

    Raises:
        UserError: DeepSpeed's files are missing or damaged.
    """
    if before != now:
        load_resized(engine, checkpoint, before)
        return
    path, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    if path is None:
        raise UserError(f"{checkpoint}: its DeepSpeed state is missing; resume from another checkpoint of the run")
