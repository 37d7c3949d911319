"""The contrastive loss beside its peers: the same features and labels, equal results first, then time and memory."""

import importlib
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.nn.functional import normalize

from jointfuse.bench.device import Collectives, device, device_name, matmul_rate, peak_bytes, seconds
from jointfuse.bench.ranks import on_ranks
from jointfuse.bench.result import write_result
from jointfuse.errors import UserError
from jointfuse.losses import inter_class_contrastive_loss

TEMPERATURE = 0.1
# Shares of MELD's seven emotions in its training set: neutral, joy, surprise, anger, sadness, disgust, fear.
SHARES = (0.472, 0.175, 0.121, 0.111, 0.068, 0.027, 0.026)
WIDTHS = (768, 1536, 2048)
ROWS = {"cpu": (1024, 2048, 4096, 8192), "cuda": (1024, 2048, 4096, 8192, 16384, 32768, 65536)}
OURS = "jointfuse "
DENSE_COPIES = 8  # K x K float32 that a dense form holds at its peak, or more
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Method:
    """A loss of features (n, D) and labels (n,); `make` imports what it needs."""

    name: str
    make: Callable[[], Loss]
    dense: bool = False  # holds K x K
    gpu_only: bool = False
    same_loss: bool = True


@dataclass
class Cell:
    """One method at one size. What could not be measured is None, and `note` says why."""

    method: str
    rows: int
    width: int
    seconds: float | None = None
    peak_bytes: int | None = None  # above the features, gradient included
    share_of_matmul: float | None = None  # of 6 K^2 D operations
    sent_forward: int | None = None
    sent_backward: int | None = None
    note: str = ""


def dense_loss(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Equation (7) with all similarities at once, by autograd: what one writes without thinking of memory."""
    z = normalize(features.float(), dim=1)
    s = z @ z.T / TEMPERATURE
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    same = (labels[:, None] == labels) & ~itself
    log_p = s - s.masked_fill(itself, -torch.inf).logsumexp(dim=1, keepdim=True)
    partners = same.sum(dim=1)
    losses = -(log_p * same).sum(dim=1) / partners.clamp_min(1)
    return losses.sum() / (partners > 0).sum().clamp_min(1)


def gathered_dense_loss(features: torch.Tensor, labels: torch.Tensor, temperature: float = TEMPERATURE) -> torch.Tensor:
    """The same over ranks of as many rows, features gathered with their gradient, as open_clip's gather_with_grad and
    local_loss do. A rank's share: the mean over ranks is the loss."""
    from torch.distributed.nn.functional import all_gather

    z = normalize(features.float(), dim=1)
    pool = torch.cat(all_gather(z))
    every = [torch.empty_like(labels) for _ in range(dist.get_world_size())]
    dist.all_gather(every, labels)
    pool_labels = torch.cat(every)
    s = z @ pool.T / temperature
    itself = torch.zeros_like(s, dtype=torch.bool)
    itself.diagonal(dist.get_rank() * len(z)).fill_(True)
    same = (labels[:, None] == pool_labels) & ~itself
    log_p = s - s.masked_fill(itself, -torch.inf).logsumexp(dim=1, keepdim=True)
    partners = same.sum(dim=1)
    counted = (torch.bincount(pool_labels)[pool_labels] > 1).sum()
    return -((log_p * same).sum(dim=1) / partners.clamp_min(1)).sum() * dist.get_world_size() / counted.clamp_min(1)


def _ours(backend: str) -> Callable[[], Loss]:
    return lambda: lambda f, y: inter_class_contrastive_loss(f, y, TEMPERATURE, backend=backend)


def _metric_learning() -> Loss:
    losses = importlib.import_module("pytorch_metric_learning.losses")
    loss = losses.SupConLoss(temperature=TEMPERATURE)
    return lambda f, y: loss(f.float(), y)


def _inf_cl() -> Loss:
    cal_flash_loss = importlib.import_module("inf_cl").cal_flash_loss

    def one_positive(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        # It takes one positive a row and counts a row among its own negatives: the next row of the class serves.
        order = labels.argsort(stable=True)
        partner = torch.empty_like(order)
        partner[order] = order.roll(-1)
        z = normalize(features.float(), dim=1)
        return cal_flash_loss(z, z, partner, 1 / TEMPERATURE).mean()

    return one_positive


METHODS = (
    Method(f"{OURS}tiled", _ours("tiled")),
    Method(f"{OURS}triton", _ours("triton"), gpu_only=True),
    Method(f"{OURS}reference", _ours("reference"), dense=True),
    Method("dense torch", lambda: dense_loss, dense=True),
    Method("dense torch.compile", lambda: torch.compile(dense_loss), dense=True),
    Method("pytorch-metric-learning", _metric_learning, dense=True),
    Method("inf-cl", _inf_cl, gpu_only=True, same_loss=False),
)
METHODS_OF_RANKS = (
    Method(f"{OURS}tiled", _ours("tiled")),
    Method(f"{OURS}triton", _ours("triton"), gpu_only=True),
    Method("dense torch, gathered with gradient", lambda: gathered_dense_loss, dense=True),
)


def benchmark_icl(
    rows: list[int] | None,
    widths: list[int] | None,
    dtype: str,
    repeats: int,
    ranks: int,
    only: list[str] | None,
    out: Path | None,
    console: Console,
) -> dict[str, Any]:
    """Measure, print a table a size, write the result file. See `python -m jointfuse.bench icl --help`.

    Raises:
        UserError: a method, precision or number of ranks that cannot be measured here.
    """
    cuda = device().type == "cuda"
    precision = {"auto": "bfloat16" if cuda else "float32"}.get(dtype, dtype)
    if precision not in ("float32", "bfloat16", "float16"):
        raise UserError(f"--dtype {dtype}: choose one of auto, float32, bfloat16, float16")
    methods = METHODS if ranks == 1 else METHODS_OF_RANKS
    unknown = set(only or ()) - {method.name for method in methods}
    if unknown:
        raise UserError(f"--only '{min(unknown)}': choose among {', '.join(method.name for method in methods)}")
    if cuda and ranks > torch.cuda.device_count():
        raise UserError(f"--ranks {ranks}: this machine has {torch.cuda.device_count()} GPUs")
    chosen = [method.name for method in methods if not only or method.name in only]
    sizes = [(k, d) for d in widths or WIDTHS for k in rows or ROWS[device().type]]
    if any(k % ranks for k, _ in sizes):
        raise UserError(f"--rows must be multiples of --ranks {ranks}")
    rate = matmul_rate(getattr(torch, precision))
    console.print(
        f"{device_name()}, {precision}: matmul at {rate / 1e9:,.0f} Gflop/s, {ranks} rank(s)", highlight=False
    )
    cells: list[Cell] = []
    for k, d in sizes:
        measured = _measure_ranks(chosen, k, d, precision, repeats, ranks) if ranks > 1 else None
        if measured is None:
            measured = _measure([m for m in methods if m.name in chosen], k, d, getattr(torch, precision), repeats)
        for cell in measured:
            if cell.seconds:
                cell.share_of_matmul = 6 * k**2 * d / ranks / cell.seconds / rate
        console.print(_table(measured, k, d, ranks))
        cells += measured
    figures = {"precision": precision, "ranks": ranks, "matmul_flops": rate, "cells": [asdict(cell) for cell in cells]}
    return write_result(f"icl-{ranks}-ranks" if ranks > 1 else "icl", figures, out, console)


def _inputs(k: int, d: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.multinomial(torch.tensor(SHARES), k, replacement=True, generator=generator)
    return torch.randn(k, d, generator=generator).to(device(), dtype), labels.to(device())


def _step(loss: Loss, features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient of the features."""
    leaf = features.detach().requires_grad_()
    value = loss(leaf, labels)
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def _measure(methods: list[Method], k: int, d: int, dtype: torch.dtype, repeats: int) -> list[Cell]:
    cells = [Cell(method.name, k, d) for method in methods]
    features, labels = _inputs(k, d, dtype)
    losses: dict[str, Loss] = {}
    expected = _step(_ours("reference")(), features, labels) if _fits(k) else None
    for method, cell in zip(methods, cells, strict=True):
        cell.note = _cannot(method, k)
        if cell.note:
            continue
        try:
            loss = method.make()
            found = _step(loss, features, labels)
        except ImportError as error:
            cell.note = f"{error.name} is not installed: pip install 'jointfuse[bench]'"
            continue
        except torch.OutOfMemoryError:
            cell.note = "out of memory"
            continue
        losses[method.name] = loss
        if not method.same_loss:
            cell.note = "another loss: one positive a row, the row itself among its negatives"
        elif expected is not None:
            _check_equal(method.name, found, expected, dtype)
        del found
    del expected
    for method, cell in zip(methods, cells, strict=True):
        if method.name in losses:
            cell.peak_bytes = peak_bytes(partial(_step, losses[method.name], features, labels))
    for _ in range(repeats):
        for cell in cells:
            if cell.method in losses:
                taken = seconds(partial(_step, losses[cell.method], features, labels))
                cell.seconds = min(taken, cell.seconds or taken)
    return cells


def _cannot(method: Method, k: int) -> str:
    if method.gpu_only and device().type != "cuda":
        return "needs a GPU"
    if method.dense and not _fits(k):
        return f"{k} x {k} similarities do not fit"
    return ""


def _fits(k: int) -> bool:
    """Whether a dense form has room; on a CPU one that has not takes other programs' memory before it fails."""
    if torch.cuda.is_available():
        return DENSE_COPIES * 4 * k**2 < torch.cuda.get_device_properties(0).total_memory
    return DENSE_COPIES * 4 * k**2 < 0.7 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _check_equal(
    name: str, found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype
) -> None:
    """Raises UserError where a method's loss or gradient is another one than ours: its time would mean nothing."""
    digits = 1e-3 if dtype == torch.float32 else 3e-2
    for what, a, b in zip(("loss", "gradient"), found, expected, strict=True):
        off = float((a.float() - b.float()).abs().max() / b.float().abs().max())
        if not off < digits:
            raise UserError(f"{name}: its {what} differs from the reference by {off:.1e} of the largest value")


def _measure_ranks(methods: list[str], k: int, d: int, precision: str, repeats: int, ranks: int) -> list[Cell]:
    """The slowest rank's time, the fullest rank's memory, and the bytes that a rank sends."""
    every = on_ranks(ranks, _measure_rank, methods, k, d, precision, repeats)
    cells = []
    for of_ranks in zip(*every, strict=True):
        cell = Cell(**of_ranks[0])
        for key in ("seconds", "peak_bytes", "sent_forward", "sent_backward"):
            values = [one[key] for one in of_ranks]
            setattr(cell, key, None if None in values else max(values))
        cells.append(cell)
    return cells


def _measure_rank(names: list[str], k: int, d: int, precision: str, repeats: int) -> list[dict[str, Any]]:
    dtype = getattr(torch, precision)
    features, labels = (part.chunk(dist.get_world_size())[dist.get_rank()].clone() for part in _inputs(k, d, dtype))
    cells = []
    for method in METHODS_OF_RANKS:
        if method.name not in names:
            continue
        cell = Cell(method.name, k, d, note=_cannot(method, k))
        cells.append(cell)
        if cell.note:
            continue
        loss = method.make()
        leaf = features.detach().requires_grad_()
        with Collectives() as forward:
            value = loss(leaf, labels)
        with Collectives() as backward:
            value.backward()
        cell.sent_forward, cell.sent_backward = forward.sent(), backward.sent()
        dist.barrier()
        cell.peak_bytes = peak_bytes(partial(_step, loss, features, labels))
        for _ in range(repeats):
            dist.barrier()
            taken = seconds(partial(_step, loss, features, labels))
            cell.seconds = min(taken, cell.seconds or taken)
    return [asdict(cell) for cell in cells]


def _table(cells: list[Cell], k: int, d: int, ranks: int) -> Table:
    """Times and memory, each also as a ratio to the first of ours: above 1 is slower or larger than ours."""
    table = Table(title=f"K = {k:,} rows, D = {d:,}", title_justify="left")
    headings = ["method", "seconds", "x ours", "MiB above", "x ours", "% of matmul"]
    if ranks > 1:
        headings += ["MiB sent forward", "backward"]
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "method" else "right")
    measured = [cell for cell in cells if cell.method.startswith(OURS) and cell.seconds]
    best = min(measured, key=lambda cell: cell.seconds or 0.0) if measured else Cell("", k, d)
    for cell in cells:
        if cell.seconds is None:
            table.add_row(cell.method, cell.note, *[""] * (len(headings) - 2))
            continue
        row = [
            f"{cell.method}{' *' if cell.note else ''}",
            f"{cell.seconds:.4f}",
            _ratio(cell.seconds, best.seconds),
            _mebibytes(cell.peak_bytes),
            _ratio(cell.peak_bytes, best.peak_bytes),
            f"{100 * (cell.share_of_matmul or 0):.0f}",
        ]
        if ranks > 1:
            row += [_mebibytes(cell.sent_forward), _mebibytes(cell.sent_backward)]
        table.add_row(*row, style="bold" if cell is best else None)
    notes = {cell.note for cell in cells if cell.note and cell.seconds}
    if notes:
        table.caption = "* " + "; ".join(sorted(notes))
    return table


def _ratio(value: float | None, ours: float | None) -> str:
    return f"{value / ours:.2f}" if value and ours else ""


def _mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:,.1f}"
