"""Building a corpus beside its floor: the same clips decoded and encoded by one core in a plain loop, times the cores.

Rates are given by the clock and, for machines with other things to do, by processor time alone.
"""

import io
import math
import os
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
from rich.console import Console
from rich.table import Table

from jointfuse.bench.device import device_name, mebibytes
from jointfuse.bench.result import write_result
from jointfuse.data.build import build
from jointfuse.data.clips import load_clip
from jointfuse.data.corpora.meld import COLUMNS, FOLDERS, LABELS, TABLES, meld_corpus
from jointfuse.data.corpora.table import table_corpus
from jointfuse.data.media import read_media
from jointfuse.data.mel import INT16, SAMPLE_RATE, MelSums, to_pcm
from jointfuse.data.parallel import cores, processes
from jointfuse.data.rows import CorpusSpec
from jointfuse.errors import UserError
from jointfuse.files import write_text

# Clips; the rest are links to them, since MP4 takes ten times as long to write as to read. The plain loop takes each of
# them once, before the build and again after it: of fewer, it would find the next one in the processor's cache.
DIFFERENT = 2000
LOOK = 0.5  # seconds between two looks at the building processes
LOOPS = {"decode + encode": False, "decode + encode + mel": True}  # with the mel statistics?


def benchmark_build(
    clips: int,
    clip_seconds: float,
    rate: int,
    media: str,
    workers: int | None,
    builds: int,
    out: Path | None,
    console: Console,
) -> dict[str, Any]:
    """Measure, print a table, write the result file. See `python -m jointfuse.bench build --help`.

    Raises:
        UserError: media of an unknown name.
    """
    if media not in MEDIA:
        raise UserError(f"--media {media}: choose one of {', '.join(MEDIA)}")
    workers = workers or cores()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        different = _write_clips(folder, clips, clip_seconds, rate, media)
        loops: dict[str, list[tuple[float, float]]] = {loop: [] for loop in LOOPS}
        _plain_all(different, loops)
        built = []
        for _ in range(builds):
            built.append(_build_apart(media, folder, workers))
            _plain_all(different, loops)
    assert all(one["samples"] == clips for one in built)
    ours = _rates(clips, [one["times"] for one in built])
    floors = {loop: _rates(len(different), times) for loop, times in loops.items()}
    for floor in floors.values():
        floor["clips_a_second"] *= workers
        floor["ratio"] = ours["clips_a_second"] / floor["clips_a_second"]
        busy = ours["clips_a_processor_second"]
        floor["ratio_by_processor_time"] = busy and busy / floor["clips_a_processor_second"]
    figures = {
        "clips": clips,
        "clip_seconds": clip_seconds,
        "rate": rate,
        "media": media,
        "workers": workers,
        "load_average": os.getloadavg()[0],
        "ours": ours,
        "floors": floors,
        "seconds_of_builds": [one["times"][0] for one in built],
        "seconds_of_loops": {loop: [seconds for seconds, _ in times] for loop, times in loops.items()},
        "bytes_at_a_tenth": built[-1]["bytes_at_a_tenth"],
        "bytes_at_the_end": built[-1]["bytes_at_the_end"],
    }
    console.print(_table(figures))
    return write_result("build", figures, out, console)


def _rates(clips: int, times: list[tuple[float, float]]) -> dict[str, Any]:
    """Of passes over so many clips, from the seconds and processor seconds (NaN: unknown) of each."""
    seconds, busy = (sum(one) for one in zip(*times, strict=True))
    by_processor = None if math.isnan(busy) else clips * len(times) / busy
    return {"clips_a_second": clips * len(times) / seconds, "clips_a_processor_second": by_processor}


def _build_apart(media: str, folder: Path, workers: int) -> dict[str, Any]:
    """One build of everything, started in a fresh process as a user's is, with what it took."""
    corpus = folder / "corpus"
    with processes(1) as pool:
        process = pool.submit(os.getpid).result()
        with _watched(corpus / "train", process) as looks:
            samples, seconds, used = pool.submit(_build, media, folder, corpus, workers).result()
    shutil.rmtree(corpus)
    tenth = next((look for look in looks if look["shards"] * 10 >= looks[-1]["shards"] > 0), None)
    return {
        "samples": samples,
        "times": (seconds, used + (looks[-1]["processor_seconds"] if looks else math.nan)),
        "bytes_at_a_tenth": tenth and tenth["bytes"],
        "bytes_at_the_end": max(look["bytes"] for look in looks[-5:]) if looks else None,
    }


def _build(media: str, folder: Path, corpus: Path, workers: int) -> tuple[int, float, float]:
    """Training samples, seconds and processor seconds of this process."""
    started, used = time.perf_counter(), time.process_time()
    info = build(MEDIA[media](folder), corpus, workers)
    return info["splits"]["train"]["samples"], time.perf_counter() - started, time.process_time() - used


def _write_clips(folder: Path, clips: int, clip_seconds: float, rate: int, media: str) -> list[Path]:
    """Voices with pauses and noise in the folders, under the names and with the tables of MELD, all but two of them in
    train; every clip is a piece of one long recording, or the same as another. The different ones of train."""
    random = np.random.default_rng(0)
    time_ = np.arange(round((clip_seconds + 60) * rate)) / rate
    pitch = 2 * np.pi * np.cumsum(150 + 40 * np.sin(2 * np.pi * 0.7 * time_)) / rate
    voice = sum(np.sin(k * pitch) / k for k in range(1, 15)) * np.maximum(np.sin(2 * np.pi * 1.3 * time_), 0)
    sound = to_pcm((0.1 * voice + 0.003 * random.standard_normal(len(time_))).astype(np.float32))
    length = round(clip_seconds * rate)
    different = []
    for split, number_of_clips in (("train", clips), ("dev", 1), ("test", 1)):
        (folder / FOLDERS[split]).mkdir()
        written: list[Path] = []
        lines = [f"Sr No.,{','.join(COLUMNS)},audio"]
        for number in range(number_of_clips):
            file = f"{FOLDERS[split]}/dia{number // 10}_utt{number % 10}.{media}"
            if number < DIFFERENT:
                start = random.integers(60 * rate)
                _write_clip(folder / file, sound[start : start + length], rate)
                written.append(folder / file)
            else:
                os.link(written[number % DIFFERENT], folder / file)
            said = f"said {number},Anna,{LABELS[number % 7]},neutral,{number // 10},{number % 10},1,1"
            lines.append(f"{number + 1},{said},0,{clip_seconds},{file}")
        write_text(folder / TABLES[split], "\n".join(lines) + "\n")
        different += written if split == "train" else []
    return different


def _write_clip(path: Path, sound: np.ndarray, rate: int) -> None:
    """(S,) int16, into the one channel of a WAV file or both of an MP4 file."""
    if path.suffix == ".wav":
        soundfile.write(path, sound, rate)
        return
    with av.open(str(path), "w", format="mp4") as container:
        track = container.add_stream("aac", rate=rate, layout="stereo")
        frame = av.AudioFrame.from_ndarray(np.stack([sound / np.float32(INT16)] * 2), "fltp", "stereo")
        frame.sample_rate, frame.pts = rate, 0
        container.mux(track.encode(frame))
        container.mux(track.encode(None))


def _meld(folder: Path) -> CorpusSpec:
    counts = {}
    for split, table in TABLES.items():
        lines = (folder / table).read_text(encoding="utf-8").splitlines()[1:]
        counts[split] = Counter(line.split(",")[3] for line in lines)
    return meld_corpus(folder, published=counts)


def _table_of_files(folder: Path) -> CorpusSpec:
    tables = [(split, folder / table) for split, table in TABLES.items()]
    return table_corpus(tables, "synthetic", dialogues_per_table=True)


MEDIA = {"mp4": _meld, "wav": _table_of_files}


def _plain_all(paths: list[Path], into: dict[str, list[tuple[float, float]]]) -> None:
    with processes(1) as pool:
        pool.submit(_plain, paths[:10], True).result()  # the first call loads libraries
        for loop, with_mel in LOOPS.items():
            into[loop].append(pool.submit(_plain, paths, with_mel).result())


def _plain(paths: list[Path], with_mel: bool) -> tuple[float, float]:
    """Seconds and processor seconds of reading, encoding and perhaps hearing each clip."""
    mel = MelSums()
    started, used = time.perf_counter(), time.process_time()
    for path in paths:
        clip = to_pcm(load_clip(path) if path.suffix == ".wav" else read_media(path).waveform)
        soundfile.write(io.BytesIO(), clip, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
        if with_mel:
            mel.add(clip)
    return time.perf_counter() - started, time.process_time() - used


@contextmanager
def _watched(folder: Path, process: int) -> Iterator[list[dict[str, Any]]]:
    """Looks at a process and those it started, while inside: finished shards in `folder`, resident bytes of all,
    processor seconds of the started ones. Empty where there is no /proc."""
    looks: list[dict[str, Any]] = []
    spent: dict[int, float] = {}
    done = threading.Event()

    def look() -> None:
        while not done.wait(LOOK):
            held = 0
            for one in (process, *_started_by(process)):
                with suppress(OSError, ValueError, IndexError):
                    held += _resident(one)
                    fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
                    spent[one] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            shards = len(list(folder.glob("shard-*.json")))
            busy = sum(seconds for one, seconds in spent.items() if one != process)
            looks.append({"shards": shards, "bytes": held, "processor_seconds": busy})

    watcher = threading.Thread(target=look, daemon=True)
    if Path("/proc/self/stat").exists():
        watcher.start()
    try:
        yield looks
    finally:
        done.set()
        if watcher.is_alive():
            watcher.join()


def _started_by(process: int) -> list[int]:
    """The processes below it."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = [process]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def _resident(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _table(figures: dict[str, Any]) -> Table:
    title = (
        f"{device_name()}, load {figures['load_average']:.1f}\n{figures['clips']:,} clips of "
        f"{figures['clip_seconds']:g} s at {figures['rate']:,} Hz ({figures['media']}), {figures['workers']} processes"
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
