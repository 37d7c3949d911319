"""A training step beside the same model written plainly: transformers and timm modules, DistributedDataParallel, Adam.

Both train on the same batches from the same weights, by turns, and must lose the same at every step. Then ours trains
on by turns on batches of similar length and on batches in random order.
"""

import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from jointfuse.bench.device import device_name, matmul_rate, mebibytes, peak_bytes, seconds
from jointfuse.bench.icl import gathered_dense_loss
from jointfuse.bench.literal import LiteralNetwork
from jointfuse.bench.ranks import on_ranks
from jointfuse.bench.result import write_result
from jointfuse.config import Config, load_config
from jointfuse.data.batch import Batch
from jointfuse.data.plan import Plan
from jointfuse.errors import UserError

# Dropout is drawn in another order by the two forms; without it their losses can be compared.
STILL = (
    "model.dropout=0",
    "model.extractor.dropout=0",
    "model.text_encoder.dropout=0",
    "model.language.dropout=0",
    "model.vision.dropout=0",
    "model.vision.drop_path=0",
)
LARGEST_DIFFERENCE = 1e-4  # of losses, float32


def benchmark_step(
    recipe: str,
    overrides: list[str],
    ranks: int,
    steps: int,
    out: Path | None,
    profile: Path | None,
    console: Console,
) -> dict[str, Any]:
    """Measure, print a table, write the result file. See `python -m jointfuse.bench step --help`.

    Raises:
        UserError: settings that cannot be compared, or losses that are not the same.
    """
    from jointfuse.data.mixture import open_for_training
    from jointfuse.train.deepspeed_file import read_deepspeed_file

    config = load_config(recipe, [*overrides, *STILL])
    utterances = len(open_for_training(config.data).split("train").index)
    if utterances < config.train.batch:
        raise UserError(f"train.batch = {config.train.batch}: the corpus has {utterances} utterances to train on")
    if read_deepspeed_file(config.train).stage == 3:
        raise UserError("train.deepspeed: the plain model is made of whole parameters; choose stage 0, 1 or 2")
    for setting, value, wanted in (
        ("model.modality", config.model.modality, "both"),
        ("loss.temperature trained", config.loss.train_temperature, False),
        ("loss.normalize", config.loss.normalize, True),
        ("loss.pool", config.loss.pool, "step"),
        ("train.checkpointing", config.train.checkpointing, "none"),
    ):
        if value != wanted:
            raise UserError(f"{setting} = {value}: the plain model is written for {wanted}")
    if profile and not profile.absolute().parent.is_dir():
        raise UserError(f"--profile {profile}: there is no folder {profile.absolute().parent}")
    if config.train.micro_batch not in (None, config.train.batch // ranks):
        raise UserError("train.micro_batch: the plain model knows no gradient accumulation; leave it out")
    with tempfile.TemporaryDirectory() as folder:
        figures = on_ranks(ranks, _measure, config.model_dump_json(), steps, folder, profile)[0]
    worst = max(abs(ours - plain) for ours, plain in zip(figures["ours_losses"], figures["plain_losses"], strict=True))
    figures["largest_difference"] = worst
    if not worst < LARGEST_DIFFERENCE * max(map(abs, figures["plain_losses"])):
        raise UserError(f"the two models lose differently, by {worst:.1e}: their times would mean nothing")
    console.print(_table(figures, config, ranks))
    return write_result("step", {"recipe": config.recipe, "ranks": ranks, "steps": steps} | figures, out, console)


class Losses:
    """What a step of the Trainer reports to, in place of its log."""

    def __init__(self) -> None:
        self.last = torch.zeros(())

    def add(self, losses: dict[str, torch.Tensor], batch: Batch) -> None:
        self.last = losses["loss"].detach().float()

    def end_step(self, total: int, taken: bool) -> None:
        assert taken


def _measure(settings: str, steps: int, folder: str, profile: Path | None) -> dict[str, Any]:
    """What a rank sees; losses are means over ranks."""
    from jointfuse.train.loop import Trainer

    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)
    trainer = Trainer(Config.model_validate_json(settings), Path(folder) / "run", resume=False)
    plain = _Plain(trainer)
    recorded: Any = Losses()
    ours, theirs = _Times(), _Times()
    batches = whole_batches(trainer, trainer.plan)
    for number in range(steps + 1):  # the first is not counted: kernels are chosen, buffers made
        total, micro = next(batches)
        trainer.position.step = number + 1
        dist.barrier()
        ours.add(seconds(partial(trainer._step, total, micro, recorded)), recorded.last)
        dist.barrier()
        theirs.add(seconds(partial(plain.step, micro[0], number)), plain.last)

    for number in range(steps + 2):
        if number == 2:  # the loader's workers start with the first
            waited, started = trainer.waited.seconds, time.perf_counter()
        total, micro = next(batches)
        trainer.position.step = steps + 2 + number
        seconds(partial(trainer._step, total, micro, recorded))
    elapsed = time.perf_counter() - started
    share_of_wait = (trainer.waited.seconds - waited) / elapsed
    by_length, in_random_order = _orders(trainer, steps, recorded)

    if profile and dist.get_rank() == 0:
        with torch.profiler.profile(record_shapes=True) as trace:
            trainer._step(*next(batches), recorded)
        trace.export_chrome_trace(str(profile))
    elif profile:
        trainer._step(*next(batches), recorded)
    # Last: measuring memory slows allocation down.
    total, micro = next(batches)
    ours_peak = peak_bytes(partial(trainer._step, total, micro, recorded))
    plain_peak = peak_bytes(partial(plain.step, micro[0], steps))
    batch = trainer.plan.batch
    with FlopCounterMode(display=False) as counter:
        total, micro = next(batches)
        trainer.engine.module(micro[0], total)["loss"].backward()
    rate = matmul_rate(next(plain.network.parameters()).dtype)
    return {
        "batch": batch,
        "ours_seconds": ours.typical(),
        "plain_seconds": theirs.typical(),
        "ratio": theirs.typical() / ours.typical(),
        "random_order_ratio": in_random_order / by_length,
        "ours_losses": ours.losses(),
        "plain_losses": theirs.losses(),
        "ours_peak_bytes": ours_peak,
        "plain_peak_bytes": plain_peak,
        "share_of_data_wait": share_of_wait,
        "matmul_flops": rate,
        "share_of_matmul": counter.get_total_flops() / ours.typical() / rate,
    }


def _orders(trainer: Any, steps: int, recorded: Any) -> list[float]:
    """Seconds a position (of a patch or a character, not of padding) on batches of similar length, and on batches in
    random order."""
    plan: Plan = trainer.plan
    plans = [plan, replace(plan, lengths=np.ones(len(plan.lengths), dtype=np.int64))]
    batches = [whole_batches(trainer, plan) for plan in plans]
    taken, positions = np.zeros(2), torch.zeros(2)
    for number in range(steps + 1):
        for order in range(2):
            total, micro = next(batches[order])
            trainer.position.step += 1
            dist.barrier()
            elapsed = seconds(partial(trainer._step, total, micro, recorded))
            if number:  # in the first, the loader's workers start
                taken[order] += elapsed
                positions[order] += int(plan.lengths[micro[0].ids.cpu().numpy()].sum())
    dist.all_reduce(positions)
    return (taken / positions.numpy()).tolist()


class _Times:
    def __init__(self) -> None:
        self.taken: list[float] = []
        self.lost: list[torch.Tensor] = []

    def add(self, taken: float, loss: torch.Tensor) -> None:
        self.taken.append(taken)
        self.lost.append(loss)

    def typical(self) -> float:
        """Median seconds of a step, the first left out."""
        return median(self.taken[1:])

    def losses(self) -> list[float]:
        """Mean over ranks at every step."""
        every = torch.stack(self.lost)
        dist.all_reduce(every)
        return (every / dist.get_world_size()).tolist()


def whole_batches(trainer: Any, plan: Plan) -> Iterator[tuple[int, list[Batch]]]:
    """The training batches, epoch after epoch, whole ones alone."""
    while True:
        trainer.plan = plan
        for total, micro in trainer._batches():
            if total == plan.batch:
                yield total, micro
        trainer.position.epoch += 1


class _Plain:
    """The plain model under DistributedDataParallel, with torch's Adam and the trainer's rates."""

    def __init__(self, trainer: Any) -> None:
        from jointfuse.model.network import part_of
        from jointfuse.train.schedule import lr_factor

        config: Config = trainer.config
        self.config, self.device, self.total_steps, self.factor = config, trainer.device, trainer.steps, lr_factor
        self.network = LiteralNetwork(trainer.engine.module.network, config.data.max_seconds).to(self.device)
        self.network.train()
        frozen = set(config.train.freeze)
        groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for name, parameter in self.network.named_parameters():
            part = part_of(name, "both")
            parameter.requires_grad_(part not in frozen)
            if part not in frozen:
                groups.setdefault((part, parameter.ndim > 1), []).append(parameter)
        for module in self.network.modules():
            if not any(parameter.requires_grad for parameter in module.parameters()):
                module.eval()
        settings = config.train
        kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
        self.rates = [settings.part_lr.get(part, settings.lr) for part, _ in groups]  # type: ignore[call-overload]
        self.optimizer = kind(
            [
                {"params": parameters, "weight_decay": settings.weight_decay if decays else 0.0}
                for (_, decays), parameters in groups.items()
            ],
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.epsilon,
            fused=True,
        )
        self.model = DistributedDataParallel(self.network)
        self.last = torch.zeros(())

    def step(self, batch: Batch, number: int) -> None:
        settings, loss_settings = self.config.train, self.config.loss
        factor = self.factor(settings, number, self.total_steps)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        logits, features = self.model(batch)
        loss = cross_entropy(logits, batch.labels)
        if loss_settings.icl_weight:
            icl = gathered_dense_loss(features, batch.labels, loss_settings.temperature)
            loss = loss + loss_settings.icl_weight * icl
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if settings.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        self.optimizer.step()
        self.last = loss.detach().float()


def _table(figures: dict[str, Any], config: Config, ranks: int) -> Table:
    title = f"{device_name()}\n{config.recipe}, batch {figures['batch']} over {ranks} ranks, {config.train.deepspeed}"
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("figure", justify="right")
    for name, key in (("jointfuse", "ours_seconds"), ("plain, DistributedDataParallel", "plain_seconds")):
        table.add_row(f"{name}, utterances a second", f"{figures['batch'] / figures[key]:.1f}")
    table.add_row("plain / jointfuse, time of a step", f"{figures['ratio']:.2f}")
    table.add_row("batches in random order / of similar length, time", f"{figures['random_order_ratio']:.2f}")
    table.add_row("largest difference of losses", f"{figures['largest_difference']:.1e}")
    for name, key in (("jointfuse", "ours_peak_bytes"), ("plain", "plain_peak_bytes")):
        table.add_row(f"{name}, memory a step needs besides what is held, MiB", mebibytes(figures[key]))
    table.add_row("jointfuse: share of time that waits for data", f"{figures['share_of_data_wait']:.1%}")
    table.add_row("jointfuse: operations counted, share of the matmul rate", f"{figures['share_of_matmul']:.0%}")
    return table
