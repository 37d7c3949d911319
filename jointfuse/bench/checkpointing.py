"""Modes of gradient checkpointing: time and memory of a step under each, by turns, on the same batches.

What is kept is what a forward pass leaves for the backward pass; a step's peak has gradients and optimiser besides.
"""

import logging
import tempfile
import warnings
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from jointfuse.bench.device import device_name, held_bytes, mebibytes, peak_bytes, seconds
from jointfuse.bench.ranks import on_ranks
from jointfuse.bench.result import write_result
from jointfuse.bench.step import Losses, whole_batches
from jointfuse.config import Config, TrainSettings, load_config

MODES = get_args(TrainSettings.model_fields["checkpointing"].annotation)


def benchmark_checkpointing(
    recipe: str, overrides: list[str], steps: int, out: Path | None, console: Console
) -> dict[str, Any]:
    """Measure, print a table, write the result file. See `python -m jointfuse.bench checkpointing --help`.

    Raises:
        UserError: settings or a corpus that cannot be used.
    """
    config = load_config(recipe, [*overrides, "train.checkpointing=none"])
    with tempfile.TemporaryDirectory() as folder:
        modes = on_ranks(1, _measure, config.model_dump_json(), steps, folder)[0]
    title = f"{device_name()}\n{config.recipe}, batch {config.train.batch} on one rank, {config.train.deepspeed}"
    table = Table(title=title, title_justify="left")
    for column in ("checkpointing", "utterances a second", "x none", "kept, MiB", "peak of a step, MiB"):
        table.add_column(column, justify="left" if column == "checkpointing" else "right")
    for mode, found in modes.items():
        table.add_row(
            mode,
            f"{config.train.batch / found['seconds']:.1f}",
            f"{modes['none']['seconds'] / found['seconds']:.2f}",
            mebibytes(found["kept_bytes"]),
            mebibytes(found["peak_bytes"]),
        )
    console.print(table)
    return write_result("checkpointing", {"recipe": config.recipe, "steps": steps, "modes": modes}, out, console)


def _measure(settings: str, steps: int, folder: str) -> dict[str, dict[str, Any]]:
    from jointfuse.train.loop import Trainer

    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)
    trainer = Trainer(Config.model_validate_json(settings), Path(folder) / "run", resume=False)
    batches = whole_batches(trainer, trainer.plan)
    recorded: Any = Losses()
    taken: dict[str, list[float]] = {mode: [] for mode in MODES}
    peaks: dict[str, list[int | None]] = {mode: [] for mode in MODES}
    held: dict[str, list[int | None]] = {mode: [] for mode in MODES}
    for _ in range(steps + 1):
        total, micro = next(batches)
        trainer.position.step += 1
        for mode in MODES:
            trainer.engine.module.network.checkpointing = mode
            taken[mode].append(seconds(partial(trainer._step, total, micro, recorded)))
            held[mode].append(held_bytes(partial(trainer.engine.module, micro[0], total)))
            peaks[mode].append(peak_bytes(partial(trainer._step, total, micro, recorded)))
    # The first of each is not counted: kernels are chosen, buffers made.
    return {
        mode: {
            "seconds": median(taken[mode][1:]),
            "kept_bytes": _largest(held[mode][1:]),
            "peak_bytes": _largest(peaks[mode][1:]),
        }
        for mode in MODES
    }


def _largest(found: list[int | None]) -> int | None:
    return max((number for number in found if number is not None), default=None)
