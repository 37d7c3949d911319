"""The plan of a corpus of any size: opening it, naming its first batch, naming every batch of an epoch."""

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from jointfuse.bench.device import device_name, mebibytes, status
from jointfuse.bench.result import write_result
from jointfuse.config import DataSettings
from jointfuse.data.index import FORMAT, INDEX_DTYPE, shard_name
from jointfuse.data.plan import Plan
from jointfuse.data.reader import UtteranceReader
from jointfuse.data.shards import Corpus
from jointfuse.errors import UserError
from jointfuse.files import replacing, write_json

CHUNK = 10**6  # utterances of the index that are written at once


def benchmark_plan(utterances: int, shards: int, batch: int, out: Path | None, console: Console) -> dict[str, Any]:
    """Measure, print a table, write the result file. See `python -m jointfuse.bench plan --help`.

    Raises:
        UserError: fewer utterances than shards.
    """
    if utterances < shards:
        raise UserError(f"--shards {shards}: there are {utterances} utterances")
    with tempfile.TemporaryDirectory() as folder:
        _write_corpus(Path(folder), utterances, shards)
        before = _memory()
        started = time.perf_counter()
        split = Corpus.open(folder).split("train")
        opened = time.perf_counter()
        reader = UtteranceReader(split, DataSettings(), None, True, 0.0, 1.0)
        plan = Plan(reader.positions((16, 16)), batch, 0, split.shard_sizes)
        next(plan.batches(0))
        named = time.perf_counter()
        after_one = _memory()
        count = sum(int(valid.sum()) for _, valid in plan.batches(0))
        done = time.perf_counter()
        after_all = _memory()
    assert count == utterances
    figures = {
        "utterances": utterances,
        "shards": shards,
        "batch": batch,
        "window": plan.window,
        "opening_seconds": opened - started,
        "first_batch_seconds": named - opened,
        "epoch_seconds": done - named,
        "first_batch_bytes": _above(before, after_one),
        "epoch_bytes": _above(before, after_all),
    }
    console.print(_table(figures))
    return write_result("plan", figures, out, console)


def _write_corpus(folder: Path, utterances: int, shards: int) -> None:
    """A corpus of empty tars and an index of clips of 0.3 to 10 seconds."""
    (folder / "train").mkdir()
    random = np.random.default_rng(0)
    sizes = np.diff(np.linspace(0, utterances, shards + 1).astype(np.int64))
    with replacing(folder / "train" / "index.bin") as file:
        for start in range(0, utterances, CHUNK):
            rows = np.zeros(min(CHUNK, utterances - start), dtype=INDEX_DTYPE)
            rows["duration_ms"] = random.integers(300, 10_000, len(rows))
            file.write(rows.tobytes())
    for number in range(shards):
        (folder / "train" / shard_name(number)).touch()
    described = [
        {"name": shard_name(n), "samples": int(size), "bytes": 0, "sha256": "0" * 64} for n, size in enumerate(sizes)
    ]
    split = {
        "samples": utterances,
        "dialogues": 1,
        "seconds": 0.0,
        "lacking": {"text": 0, "clip": 0, "both": 0},
        "label_counts": {"a": utterances, "b": 0},
        "speakers": [],
        "shards": described,
    }
    mel = {"mean": 0.0, "deviation": 1.0}
    info = {"format": FORMAT, "name": "synthetic", "labels": ["a", "b"], "speakers": [], "mel": mel}
    write_json(folder / "corpus.json", info | {"splits": {"train": split}})


def _memory() -> tuple[int, int] | None:
    """Bytes of this process's own, and of mapped files; None where the system does not tell."""
    try:
        return status("RssAnon"), status("RssFile")
    except OSError:
        return None


def _above(before: tuple[int, int] | None, after: tuple[int, int] | None) -> dict[str, int] | None:
    if before is None or after is None:
        return None
    return {"own": after[0] - before[0], "mapped": after[1] - before[1]}


def _table(figures: dict[str, Any]) -> Table:
    title = (
        f"{device_name()}\n{figures['utterances']:,} utterances in {figures['shards']:,} shards, "
        f"batches of {figures['batch']}, sorted {figures['window']} at a time"
    )
    table = Table(title=title, title_justify="left")
    for name in ("what", "seconds", "memory, MiB", "of the index, mapped, MiB"):
        table.add_column(name, justify="left" if name == "what" else "right")
    table.add_row("opening the corpus", f"{figures['opening_seconds']:.2f}")
    for name, key in (("naming the first batch", "first_batch"), ("naming every batch of an epoch", "epoch")):
        held = figures[f"{key}_bytes"] or {"own": None, "mapped": None}
        table.add_row(name, f"{figures[f'{key}_seconds']:.2f}", mebibytes(held["own"]), mebibytes(held["mapped"]))
    return table
