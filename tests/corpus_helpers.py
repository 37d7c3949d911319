"""Small tables with sound files, and the tools as a user runs them."""

import atexit
import csv
import hashlib
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from jointfuse.data import build as building
from jointfuse.data.build import build
from jointfuse.data.corpora.table import table_corpus
from jointfuse.data.rows import CorpusSpec

REPOSITORY = Path(__file__).parent.parent
COLUMNS = ("dialogue_id", "turn", "speaker", "text", "emotion", "audio")
Row = dict[str, Any]


def tone(seconds: float, rate: int = 16_000, channels: int = 1, pitch: float = 220.0) -> np.ndarray:
    """(S,) or (S, channels) float32."""
    wave = 0.5 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)
    return np.repeat(wave[:, None], channels, axis=1).astype(np.float32) if channels > 1 else wave.astype(np.float32)


def write_clip(path: Path, seconds: float = 0.2, rate: int = 16_000, channels: int = 1, pitch: float = 220.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(seconds, rate, channels, pitch), rate)


def write_table(path: Path, rows: Sequence[Row], delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def dialogue_rows(split: str, dialogues: int, turns: int) -> list[Row]:
    """Rows whose clips are wav/SPLIT_DIALOGUE_TURN.wav."""
    return [
        dict(
            zip(
                COLUMNS,
                (
                    f"{split}{dialogue}",
                    turn,
                    ("Ann", "Bob")[turn % 2],
                    f"line {turn} of {dialogue}",
                    ("joy", "anger", "fear")[(dialogue + turn) % 3],
                    f"wav/{split}_{dialogue}_{turn}.wav",
                ),
                strict=True,
            )
        )
        for dialogue in range(dialogues)
        for turn in range(turns)
    ]


def make_tables(folder: Path) -> dict[str, list[Row]]:
    """train.csv, dev.csv and test.csv with their clips, under `folder`; returns the rows."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {
        "train": dialogue_rows("train", 5, 4),
        "dev": dialogue_rows("dev", 2, 3),
        "test": dialogue_rows("test", 1, 2),
    }
    for split, content in rows.items():
        write_table(folder / f"{split}.csv", content)
        for number, row in enumerate(content):
            write_clip(folder / row["audio"], 0.15 + 0.02 * number, pitch=150 + 10 * number)
    return rows


@cache
def small_corpus() -> Path:
    """A folder of make_tables with the corpus in `built`: made once, to be copied before it is changed."""
    folder = Path(tempfile.mkdtemp(prefix="jointfuse-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    make_tables(folder)
    spec = table_corpus([(split, folder / f"{split}.csv") for split in ("train", "dev", "test")], "small")
    build(spec, folder / "built", workers=2, samples_per_shard=4)
    return folder


def build_here(spec: CorpusSpec, out: Path, samples_per_shard: int = 4) -> None:
    """build, its jobs run in this process: starting another takes longer than the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "processes", lambda *_: ThreadPoolExecutor(1))
        building.build(spec, out, workers=1, samples_per_shard=samples_per_shard)


def split_options(folder: Path) -> list[str]:
    return [part for split in ("train", "dev", "test") for part in (f"--{split}", str(folder / f"{split}.csv"))]


def run_tool(name: str, *arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of tools/NAME.py in this process: an import saved."""
    spec = importlib.util.spec_from_file_location(f"tools_{name}", REPOSITORY / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before, sys.argv = sys.argv, [name, *map(str, arguments)]
    capsys.readouterr()
    try:
        module.main()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.argv = before
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under `folder`, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
