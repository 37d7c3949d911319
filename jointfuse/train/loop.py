"""The training loop: plan, stream, engine, and the evaluations and checkpoints between steps."""

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from jointfuse.config import Config, parse_interval
from jointfuse.data.augment import Augmentation
from jointfuse.data.batch import Batch
from jointfuse.data.columns import Weights
from jointfuse.data.feed import Feed, Waited
from jointfuse.data.mixture import MixedSplit, corpus_digest, open_for_training
from jointfuse.data.plan import Plan
from jointfuse.data.reader import UtteranceReader
from jointfuse.data.stream import stream
from jointfuse.data.tokenizer import write_tokenizer
from jointfuse.errors import UserError
from jointfuse.evaluate.metrics import HEADLINES, score
from jointfuse.evaluate.predict import predict
from jointfuse.model.export import initialise, save_model
from jointfuse.model.network import Network
from jointfuse.train.checkpoint import (
    Checkpoints,
    check_resumable,
    load_checkpoint,
)
from jointfuse.train.deepspeed_file import read_deepspeed_file, slow_precision
from jointfuse.train.engine import (
    check_compile,
    divide,
    forget_gradients,
    full_state,
    layout,
    start_engine,
)
from jointfuse.train.hold import Hold
from jointfuse.train.intact import check_data
from jointfuse.train.objective import Objective
from jointfuse.train.pool import pool_step
from jointfuse.train.progress import Display
from jointfuse.train.resize import described
from jointfuse.train.run_folder import (
    BATCHES,
    BROKEN,
    FINISHED,
    SKIPPED,
    STOPPED_EARLY,
    MetricsLog,
    check_run_folder,
    create_run_folder,
    note,
    write_status,
)
from jointfuse.train.schedule import describe_longer, lr_factor
from jointfuse.train.start import splits_read, starting_mel, starting_tokenizer
from jointfuse.train.vote import Vote
from jointfuse.train.watchdog import Watchdog
from jointfuse.train.whole import Position, agreed_checkpoint
from jointfuse.train.window import Window


class Trainer:
    """One rank of a training run; torch.distributed must be initialised.

    Args:
        config: resolved settings.
        run: folder of the run.
        resume: go on from the run's latest checkpoint (from the start where it has none yet).
        asked: set once this rank is to save and stop.
        hold: rank 0 takes it before it writes to the folder.

    Raises:
        UserError: settings, data, weights or a checkpoint that cannot be used; nothing has been written then.
        PassingFault: another process trains the run.
    """

    def __init__(
        self,
        config: Config,
        run: Path,
        resume: bool,
        asked: threading.Event | None = None,
        hold: Hold | None = None,
    ) -> None:
        self.config, self.run = config, run
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        settings = config.train
        check_run_folder(run, resume)
        self.division = divide(settings, self.world_size)
        self.file = read_deepspeed_file(settings)
        self.layout = layout(self.file, self.world_size)
        check_compile(settings, self.layout.stage)
        checkpoint, self.damaged = agreed_checkpoint(run) if resume else (None, [])
        self.corpus = open_for_training(config.data)
        self.position = Position(corpus=corpus_digest(self.corpus), **asdict(self.layout))
        if checkpoint:
            self.position = check_resumable(checkpoint, config, self.world_size, self.corpus)
        elif settings.init_from:
            self.position.mel = list(starting_mel(config, self.corpus))
        mean, deviation = self.position.mel or (self.corpus.mel_mean, self.corpus.mel_deviation)
        self.mel = (mean, deviation)
        check_data(self.corpus, splits_read(config, self.corpus), config.data.verify)
        torch.manual_seed(settings.seed)
        self.tokenizer, self.unread_texts = starting_tokenizer(config, run, self.corpus)
        network = Network(
            config.model,
            len(self.corpus.labels),
            config.data.max_tokens,
            config.data.max_seconds,
            tokenizer_size=len(self.tokenizer) if self.tokenizer else 0,
            checkpointing=settings.checkpointing,
            compiled=settings.compile,
        )
        self.new_labels: list[str] = []  # that the model this one starts from does not know
        if settings.init_from and not checkpoint:
            self.new_labels = initialise(network, Path(settings.init_from), self.corpus.labels)
        network.freeze(settings.freeze)
        readers = {split: self._reader(split) for split in splits_read(config, self.corpus)}
        self.train_reader, self.dev_reader = readers["train"], readers.get("dev")
        self.plan = self._plan()
        self.steps = settings.steps or self.plan.steps_per_epoch * (settings.epochs or 0)
        objective = Objective(network, config.loss, self.division.accumulation)
        if "temperature" in settings.freeze and objective.trained_temperature is not None:
            objective.trained_temperature.requires_grad_(False)
        self.engine = start_engine(objective, config, self.division)
        self.base_rates = [group["lr"] for group in self.engine.optimizer.param_groups]
        if checkpoint:
            load_checkpoint(self.engine, checkpoint, self.position.layout, self.layout)
        dist.barrier()  # every rank has what it needs before rank 0 writes to the folder
        if self.rank == 0:
            if hold:
                hold.take()
            create_run_folder(run, config, self.world_size)
            if self.tokenizer:
                write_tokenizer(self.tokenizer, run / "tokenizer")
            note(run / SKIPPED, [{"step": 0, "rank": 0, "why": why} for why in self.unread_texts])
        self.device = self.engine.device
        self.waited = Waited()
        self.resumed_from, self.steps_before = self.position.layout, self.position.steps
        warmup = self.position.warmup if checkpoint else round(settings.warmup * self.steps)
        self.position = replace(self.position, steps=self.steps, warmup=warmup, **asdict(self.layout))
        self.log = MetricsLog(run, self.position.step) if self.rank == 0 else None
        self.broken = 0  # steps in a row
        self.skipped = 0  # utterances of this epoch, of all ranks, since the run was last started
        self.score_name = "weighted_f1" if settings.choose_by == "last" else settings.choose_by
        self.checkpoints = Checkpoints(self.engine, run, config)
        self.vote, self.stopped = Vote(asked or threading.Event()), False
        self.evaluate_every = self._in_steps(settings.evaluate_every)
        self.save_every = self._in_steps(settings.save_every)

    def _reader(self, split: str) -> UtteranceReader:
        modality = self.config.model.modality
        return UtteranceReader(
            self.corpus.split(split),
            self.config.data,
            self.tokenizer,
            modality != "text",
            *self.mel,
        )

    def _plan(self) -> Plan:
        data, settings, split = self.config.data, self.config.train, self.train_reader.split
        positions = self.train_reader.positions(self.config.model.vision.patch)
        mixed = isinstance(split, MixedSplit) and split.weights is not None
        weights = Weights(split, data.balance) if mixed or data.balance != "none" else None
        return Plan(positions, settings.batch, settings.seed, split.shard_sizes, data.shuffle_block, weights)

    def _in_steps(self, interval: str) -> int:
        count, unit = parse_interval(interval)
        return count * (self.plan.steps_per_epoch if unit == "epoch" else 1)

    def train(self) -> bool:
        """Train to the end, or until `train.patience` runs out; false: asked to stop, it has saved and can go on."""
        position = self.position
        with (
            Display(self.steps, position.step, self.rank == 0) as self.display,
            Watchdog(self.rank, self.config.train.longest_step) as self.watchdog,
        ):
            self._report_start()
            while position.step < self.steps and not self._out_of_patience() and not self.stopped:
                self._epoch()
            self.checkpoints.finish()
            if self.stopped:
                self.display.line(f"stopped at step {position.step} when asked to; --resume goes on from there")
                self._end(STOPPED_EARLY)
                return False
            if position.step < self.steps:
                self.display.line(f"stopped early: no better dev score in {self.config.train.patience} evaluations")
            chosen_by = (
                f"dev {HEADLINES[self.score_name]} {position.best_score:.4f}" if self.dev_reader else "no dev split"
            )
            self.display.line(
                f"finished at step {position.step}; chosen: step {position.best_step}, {chosen_by}: {self.run / 'best'}"
            )
        self._end(FINISHED)
        return True

    def _end(self, status: str) -> None:
        if self.log:
            self.log.close()
            write_status(self.run, status)

    def _epoch(self) -> None:
        """The rest of the current epoch; ends early when steps or patience run out."""
        position = self.position
        window = Window(self)
        for total, micro in self._batches():
            position.step += 1
            position.batch += 1
            self.watchdog.step(position.step)
            self._step(total, micro, window)
            self.display.step(position.step, position.epoch)
            last = position.step == self.steps
            if position.step % self.config.train.log_every == 0 or last:
                window.flush()
            if position.batch == self.plan.steps_per_epoch:
                window.flush()
                self._report_skipped()
                position.epoch, position.batch = position.epoch + 1, 0
            if position.step % self.evaluate_every == 0 or last:
                window.flush()
                self._evaluate()
            ends = last or self._out_of_patience()
            stop, busy = self.vote.count()
            self.stopped = stop and not ends
            if not busy:
                self.checkpoints.finish()
            if position.step % self.save_every == 0 or ends or self.stopped:
                window.flush()  # a run that resumes here logs what one that never stopped does
                self.checkpoints.save(position)
            if ends or self.stopped:
                break
            self.vote.cast(self.checkpoints.busy)

    def _out_of_patience(self) -> bool:
        patience = self.config.train.patience
        return patience is not None and self.position.evaluations_without_better >= patience

    def _batches(self) -> Iterator[tuple[int, list[Batch]]]:
        """(real utterances in the global batch, this rank's micro-batches) for the rest of the epoch."""
        accumulation = self.division.accumulation
        epoch, start = self.position.epoch, self.position.batch
        planned = self.plan.share(epoch, start, self.world_size, self.rank, accumulation)
        pin = self.device.type == "cuda"
        augmentation = Augmentation(self.config.data.augment, self.config.train.seed, epoch)
        reader = self.train_reader.for_training(augmentation)
        host = stream(reader, planned, self.config.data.workers, pin)
        batches = iter(Feed(host, self.device, reader.front_end, self.waited))
        for number in range(start, self.plan.steps_per_epoch):
            yield self.plan.counted(number), list(islice(batches, accumulation))

    def _counted(self, total: int, micro: list[Batch]) -> int:
        """Real utterances in a global batch: those planned, less those that any rank had to skip."""
        if self.config.data.on_error == "fail":
            return total
        reasons = [why for batch in micro for why in batch.skipped]
        note(self.run / SKIPPED, [{"step": self.position.step, "rank": self.rank, "why": why} for why in reasons])
        counted = torch.stack([batch.valid.sum() for batch in micro]).sum()
        dist.all_reduce(counted)
        return max(1, int(counted))

    def _step(self, total: int, micro: list[Batch], window: Window) -> None:
        position, settings = self.position, self.config.train
        if settings.record_batches:
            self._record(micro)
        total = self._counted(total, micro)
        factor = lr_factor(settings, position.step - 1, self.steps, position.warmup)
        for group, base in zip(self.engine.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = base * factor
        loss = self._micro_steps(total, micro, window)
        window.end_step(total, taken := self.engine.was_step_applied())
        if taken:
            self.broken = 0
        else:
            self._skipped_step(loss, micro)

    def _record(self, micro: list[Batch]) -> None:
        ids, valid = ([getattr(batch, name).tolist() for batch in micro] for name in ("ids", "valid"))
        row = {"step": self.position.step, "ranks": self.world_size, "ids": ids, "valid": valid}
        note(self.run / BATCHES / f"rank-{self.rank:05d}.jsonl", [row])

    def _micro_steps(self, total: int, micro: list[Batch], window: Window) -> torch.Tensor:
        """Returns the sum of this rank's losses."""
        pooled, total_loss = None, torch.zeros((), device=self.device)
        if self.engine.module.pools_beforehand:
            pooled = pool_step(self.engine.module, micro, total, self._seed)
        for number, batch in enumerate(micro):
            self._seed(number)
            losses = self.engine(batch, total, *(pooled.gradients(number) if pooled else ()))
            self.engine.backward(losses["loss"])
            self.engine.step()
            if pooled:
                losses |= {"icl": pooled.icl, "statistics": pooled.statistics}
            window.add(losses, batch)
            total_loss += losses["loss"].detach()
        return total_loss

    def _skipped_step(self, loss: torch.Tensor, micro: list[Batch]) -> None:
        """A step that the optimizer has refused, since a gradient was not finite."""
        forget_gradients(self.engine)
        finite = loss.isfinite().float()
        dist.all_reduce(finite, dist.ReduceOp.MIN)
        if finite and self.engine.fp16_enabled():
            return  # the search for a loss scale
        self.broken += 1
        split, step = self.train_reader.split, self.position.step
        ids = [int(id) for batch in micro for id in batch.ids[batch.valid]]
        note(
            self.run / BROKEN,
            [{"step": step, "rank": self.rank, "loss": str(float(loss)), "id": id, "key": split.key(id)} for id in ids],
        )
        if self.broken > self.config.train.most_broken:
            times = f"{self.broken} steps in a row, more than train.most_broken" if self.broken > 1 else "a step"
            raise self.diverged(
                f"step {step}: the loss or its gradient was not finite in {times}; {self.run / BROKEN} names their "
                "utterances"
            )

    def diverged(self, what: str) -> UserError:
        best = self.run / "best"
        return UserError(
            f"{what}; lower train.lr, or check the corpus with tools/verify_shards.py"
            f"{f'; the model chosen last is in {best}' if best.exists() else ''}"
        )

    def _seed(self, micro_batch: int) -> None:
        """Dropout is a function of (seed, step, rank, micro-batch): a resumed run draws what the first would have, and
        a second forward pass what the first has."""
        torch.manual_seed(_mix(self.config.train.seed, self.position.step, self.rank, micro_batch))

    def _evaluate(self) -> None:
        """Score the dev split; the model chosen so far is written at once. Without one, it is that of the end."""
        position = self.position
        if not self.dev_reader:
            if position.step == self.steps:
                position.best_step = position.step
                self._save_best({})
            return
        predictions = predict(self.engine.module.network, self.dev_reader, self.config.data.workers)
        result = score(predictions.labels, predictions.logits.argmax(axis=1), self.corpus.labels)
        chosen_by = result[self.score_name]
        better = chosen_by > position.best_score or self.config.train.choose_by == "last"
        if better:
            position.best_score, position.best_step = chosen_by, position.step
            position.evaluations_without_better = 0
            self._save_best(result)
        else:
            position.evaluations_without_better += 1
        figures = {name: result[name] for name in ("accuracy", "weighted_f1", "macro_f1")}
        self.display.line(
            f"dev at step {position.step}: weighted F1 {result['weighted_f1']:.4f}, accuracy {result['accuracy']:.4f}, "
            f"macro F1 {result['macro_f1']:.4f}{'  (chosen so far)' if better else ''}"
        )
        if self.log:
            # `best`: the score by which a model was chosen, where this is the best so far.
            best = chosen_by if better else None
            self.log.write("dev", position.step, epoch=position.epoch, **figures, best=best)

    def _save_best(self, dev: dict[str, Any]) -> None:
        """Every rank calls it; `dev` are the scores by which the model was chosen."""
        position, state = self.position, full_state(self.engine)
        if self.rank == 0:
            save_model(
                self.run / "best",
                state,
                self.engine.module.network,
                self.config,
                self.corpus.labels,
                self.mel,
                self.tokenizer,
                {"step": position.step, "epoch": position.epoch, "dev": dev, "corpus": position.corpus},
            )

    def _report_skipped(self) -> None:
        if self.skipped:
            self.display.line(
                f"epoch {self.position.epoch + 1}: {self.skipped} of {len(self.plan.lengths)} utterances could not be "
                f"read and were skipped; {self.run / SKIPPED} names them"
            )
        self.skipped = 0

    def _report_start(self) -> None:
        division, position = self.division, self.position
        trained = sum(_size(p) for p in self.engine.module.parameters() if p.requires_grad)
        whole = sum(_size(p) for p in self.engine.module.parameters())
        self.display.line(
            f"{self.config.recipe}: {len(self.plan.lengths)} utterances of {self.corpus.name}, "
            f"{whole / 1e6:.1f} M parameters ({trained / 1e6:.1f} M trained), batch {self.config.train.batch} = "
            f"{division.world_size} ranks x {division.accumulation} accumulated x {division.micro_batch}, "
            f"{self.config.train.deepspeed} on {self.device.type}"
        )
        if self.new_labels:
            self.display.line(f"train.init_from knows no {', '.join(self.new_labels)}: their heads begin anew")
        if self.unread_texts:
            self.display.line(
                f"{len(self.unread_texts)} texts could not be read and are not in the tokenizer; {self.run / SKIPPED} "
                "names them"
            )
        if slow := slow_precision(self.file, self.device.type):
            self.display.line(slow)
        for fault in self.damaged:
            self.display.line(f"{fault}; the newest checkpoint that is whole is of step {position.step}")
        if position.step:
            self.display.line(
                f"resumed at step {position.step} (epoch {position.epoch + 1}, batch {position.batch})"
                f"{described(self.resumed_from, self.layout)}"
            )
            if self.steps > self.steps_before:
                self.display.line(
                    describe_longer(self.config.train, position.step, self.steps_before, self.steps, position.warmup)
                )


def _size(parameter: torch.nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


def _mix(*numbers: int) -> int:
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
