"""Building a corpus beside its floor: the same clips decoded and encoded by one core in a plain loop, times the cores.

Rates are given by the clock and, for machines with other things to do, by processor time alone.
"""

import io
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from rich.console import Console
from rich.table import Table

from jointfuse.bench.device import device_name, mebibytes
from jointfuse.bench.result import write_result
from jointfuse.data.build import build
from jointfuse.data.corpora.table import load_clip, table_corpus
from jointfuse.data.mel import SAMPLE_RATE, MelSums, to_pcm
from jointfuse.data.parallel import cores, processes

PLAIN_CLIPS = 1000  # that the plain loop takes, before the build and again after it
LOOK = 0.5  # seconds between two looks at the building processes
LOOPS = {"decode + encode": False, "decode + encode + mel": True}  # with the mel statistics?


def benchmark_build(
    clips: int, clip_seconds: float, rate: int, workers: int | None, out: Path | None, console: Console
) -> dict[str, Any]:
    """Measure, print a table, write the result file. See `python -m jointfuse.bench build --help`."""
    workers = workers or cores()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = _write_clips(folder, clips, clip_seconds, rate)
        some = sorted(folder.glob("wav/*.wav"))[:: max(1, clips // PLAIN_CLIPS)]
        loops: dict[str, list[tuple[float, float]]] = {loop: [] for loop in LOOPS}
        _plain_all(some, loops)
        with _watched(folder / "corpus" / "train") as looks:
            started, used = time.perf_counter(), time.process_time()
            info = build(table_corpus([(None, table)], "synthetic"), folder / "corpus", workers)
            taken, used = time.perf_counter() - started, time.process_time() - used
        _plain_all(some, loops)
    assert info["splits"]["train"]["samples"] == clips
    processor = used + looks[-1]["processor_seconds"] if looks else None
    ours: dict[str, Any] = {
        "clips_a_second": clips / taken,
        "clips_a_processor_second": clips / processor if processor else None,
    }
    floors = {}
    for loop, times in loops.items():
        wall, busy = (len(some) * len(times) / sum(one) for one in zip(*times, strict=True))
        floors[loop] = {
            "clips_a_second": wall * workers,
            "clips_a_processor_second": busy,
            "ratio": ours["clips_a_second"] / (wall * workers),
            "ratio_by_processor_time": ours["clips_a_processor_second"] / busy if processor else None,
        }
    tenth = next((look for look in looks if look["shards"] * 10 >= looks[-1]["shards"] > 0), None)
    figures = {
        "clips": clips,
        "clip_seconds": clip_seconds,
        "rate": rate,
        "workers": workers,
        "load_average": os.getloadavg()[0],
        "ours": ours,
        "floors": floors,
        "bytes_at_a_tenth": tenth and tenth["bytes"],
        "bytes_at_the_end": max(look["bytes"] for look in looks[-5:]) if looks else None,
    }
    console.print(_table(figures))
    return write_result("build", figures, out, console)


def _write_clips(folder: Path, clips: int, clip_seconds: float, rate: int) -> Path:
    """WAV files of voices with pauses and noise, and their table; every clip is a piece of one long recording."""
    random = np.random.default_rng(0)
    time_ = np.arange(round((clip_seconds + 60) * rate)) / rate
    pitch = 2 * np.pi * np.cumsum(150 + 40 * np.sin(2 * np.pi * 0.7 * time_)) / rate
    voice = sum(np.sin(k * pitch) / k for k in range(1, 15)) * np.maximum(np.sin(2 * np.pi * 1.3 * time_), 0)
    sound = to_pcm((0.1 * voice + 0.003 * random.standard_normal(len(time_))).astype(np.float32))
    (folder / "wav").mkdir()
    length = round(clip_seconds * rate)
    lines = ["text,label,audio,dialogue_id,turn,split"]
    for number in range(clips):
        start = random.integers(60 * rate)
        soundfile.write(folder / "wav" / f"{number:08d}.wav", sound[start : start + length], rate)
        lines.append(f"said {number},{'ab'[number % 2]},wav/{number:08d}.wav,d{number // 10},{number % 10},train")
    table = folder / "all.csv"
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return table


def _plain_all(paths: list[Path], into: dict[str, list[tuple[float, float]]]) -> None:
    with processes(1, load_clip.__module__) as pool:  # in a process like those that build
        pool.submit(_plain, paths[:10], True).result()  # the first call loads libraries
        for loop, with_mel in LOOPS.items():
            into[loop].append(pool.submit(_plain, paths, with_mel).result())


def _plain(paths: list[Path], with_mel: bool) -> tuple[float, float]:
    """Seconds and processor seconds of reading, encoding and perhaps hearing each clip."""
    mel = MelSums()
    started, used = time.perf_counter(), time.process_time()
    for path in paths:
        clip = to_pcm(load_clip(path))
        soundfile.write(io.BytesIO(), clip, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
        if with_mel:
            mel.add(clip)
    return time.perf_counter() - started, time.process_time() - used


@contextmanager
def _watched(folder: Path) -> Iterator[list[dict[str, Any]]]:
    """Looks at this process and those it started, while inside: finished shards in `folder`, resident bytes of all,
    processor seconds of the started ones. Empty where there is no /proc."""
    looks: list[dict[str, Any]] = []
    spent: dict[int, float] = {}
    before = set(_started())
    done = threading.Event()

    def look() -> None:
        while not done.wait(LOOK):
            held = _resident(os.getpid())
            for process in set(_started()) - before:
                with suppress(OSError, ValueError, IndexError):
                    held += _resident(process)
                    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
                    spent[process] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            shards = len(list(folder.glob("shard-*.json")))
            looks.append({"shards": shards, "bytes": held, "processor_seconds": sum(spent.values())})

    watcher = threading.Thread(target=look, daemon=True)
    if Path("/proc/self/stat").exists():
        watcher.start()
    try:
        yield looks
    finally:
        done.set()
        if watcher.is_alive():
            watcher.join()


def _started() -> list[int]:
    """The processes below this one."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = [os.getpid()]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found[1:]


def _resident(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _table(figures: dict[str, Any]) -> Table:
    title = (
        f"{device_name()}, load {figures['load_average']:.1f}\n{figures['clips']:,} clips of "
        f"{figures['clip_seconds']:g} s at {figures['rate']:,} Hz, {figures['workers']} processes"
    )
    table = Table(title=title, title_justify="left")
    for name in ("what", "clips/s", "ours / it", "clips/s of processor time", "ours / it"):
        table.add_column(name, justify="left" if name == "what" else "right")
    rows = {"jointfuse": figures["ours"] | {"ratio": None, "ratio_by_processor_time": None}}
    rows |= {f"floor: {loop}, one core x {figures['workers']}": floor for loop, floor in figures["floors"].items()}
    for name, row in rows.items():
        keys = ("clips_a_second", "ratio", "clips_a_processor_second", "ratio_by_processor_time")
        forms = (",.0f", ".0%", ",.0f", ".0%")
        table.add_row(
            name, *("" if row[k] is None else format(row[k], form) for k, form in zip(keys, forms, strict=True))
        )
    held = " and ".join(mebibytes(figures[key]) for key in ("bytes_at_a_tenth", "bytes_at_the_end"))
    table.caption = f"memory of all building processes at a tenth and at the end: {held} MiB"
    return table
