"""The stream beside its floor, decoding alone, and beside webdataset, which reads in order and decodes the same."""

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import webdataset
from rich.console import Console
from rich.table import Table

from jointfuse.bench.device import device_name, seconds
from jointfuse.bench.result import write_result
from jointfuse.config import DataSettings
from jointfuse.data.batch import HostBatch, collate
from jointfuse.data.mel import SAMPLE_RATE
from jointfuse.data.parallel import cores
from jointfuse.data.plan import Plan
from jointfuse.data.reader import UtteranceReader
from jointfuse.data.samples import Utterance, decode_flac
from jointfuse.data.shards import Corpus, Split
from jointfuse.data.stream import stream
from jointfuse.data.tokenizer import train_tokenizer
from jointfuse.errors import UserError

WORKERS = [0, 1, 2]
FORMATS = {"FLAC": "PCM_16", "WAV": "PCM_16", "OGG": "VORBIS"}
CLIPS_A_FORMAT = 200


def benchmark_data(
    corpus: Path, batch: int, workers: list[int] | None, repeats: int, out: Path | None, console: Console
) -> dict[str, Any]:
    """Measure, print a table, write the result file. See `python -m jointfuse.bench data --help`.

    Raises:
        UserError: no corpus, one with too few utterances, or one in which some have no clip, text or label.
    """
    torch.set_num_threads(1)
    opened = Corpus.open(corpus)
    if opened.unlabelled:
        raise UserError(f"{corpus}: has turns without a label, which the peer cannot read; take another corpus")
    split = opened.split("train")
    if len(split) < batch:
        raise UserError(f"--batch {batch}: {corpus} has {len(split)} utterances to train on")
    reader = UtteranceReader(split, DataSettings(), train_tokenizer(split, 1000), True, 0.0, 1.0)
    plan = Plan(reader.positions((16, 16)), batch, 0, split.shard_sizes)
    encoded = list(_encoded(reader))
    ways: dict[str, Callable[[], Any]] = {
        "reading the bytes": partial(_read_all, split, plan),
        "decoding alone": partial(_decode_all, reader, plan, encoded),
    }
    for number in workers or WORKERS:
        ways[f"jointfuse, {number} workers"] = partial(_stream_all, reader, plan, number)
        ways[f"webdataset, {number} workers"] = partial(_webdataset_all, split, reader, batch, number)
    # By turns, so that whatever else the machine does meets all of them.
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            taken[name].append(seconds(way))
    figures = {
        "corpus": opened.name,
        "utterances": len(split),
        "seconds_of_audio": split.info["seconds"],
        "bytes": int(split.index["size"].sum()),
        "batch": batch,
        "cores": cores(),
        "seconds": {name: min(times) for name, times in taken.items()},
        "formats": _formats([clip for _, clip in encoded[:CLIPS_A_FORMAT]], repeats),
    }
    console.print(_table(figures, workers or WORKERS))
    return write_result("data", figures, out, console)


def _encoded(reader: UtteranceReader) -> Iterator[tuple[Utterance, bytes]]:
    for id in range(len(reader.split)):
        clip = reader.split.audio_bytes(id)
        assert clip is not None, "the reader has looked"
        yield reader.split.sample(id, audio=False), clip


def _decode_all(reader: UtteranceReader, plan: Plan, encoded: list[tuple[Utterance, bytes]]) -> None:
    for ids, valid in plan.batches(0):
        pairs = [encoded[id] for id in ids[valid]]
        reader.examples(
            ids[valid].tolist(), [replace(utterance, waveform=decode_flac(clip)) for utterance, clip in pairs]
        )


def _read_all(split: Split, plan: Plan) -> None:
    for ids, valid in plan.batches(0):
        for id in ids[valid]:
            split.read(int(id))


def _stream_all(reader: UtteranceReader, plan: Plan, workers: int) -> None:
    for _ in stream(reader, plan.batches(0), workers):
        pass


def _webdataset_all(split: Split, reader: UtteranceReader, batch: int, workers: int) -> None:
    """As many utterances, in the order of the tars."""
    assert reader.tokenizer is not None
    pad = reader.tokenizer.pad_token_id

    def decoded(sample: dict[str, Any]) -> Utterance:
        meta = json.loads(sample["json"])
        return Utterance(
            sample["__key__"],
            sample["txt"].decode(),
            decode_flac(sample["flac"]),
            meta["label"],
            meta["speaker"],
            meta["dialogue"],
            meta["turn"],
            meta,
        )

    def together(utterances: list[Utterance]) -> HostBatch:
        valid = np.ones(len(utterances), dtype=bool)
        return collate(reader.examples(range(len(valid)), utterances), valid, pad)

    shards = [str(path) for path in split.shards]
    dataset = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False)
    batches = dataset.map(decoded).batched(batch, together)
    for _ in webdataset.WebLoader(batches, batch_size=None, num_workers=workers):
        pass


def _formats(clips: list[bytes], repeats: int) -> dict[str, dict[str, float]]:
    """The same clips in each format: bytes and decoding seconds for a second of audio."""
    waveforms = [decode_flac(clip) for clip in clips]
    heard = sum(map(len, waveforms)) / SAMPLE_RATE
    found = {}
    for name, subtype in FORMATS.items():
        files = []
        for waveform in waveforms:
            file = io.BytesIO()
            soundfile.write(file, waveform, SAMPLE_RATE, format=name, subtype=subtype)
            files.append(file.getvalue())
        taken = min(seconds(partial(_decode_files, files)) for _ in range(repeats))
        found[name] = {"bytes_a_second": sum(map(len, files)) / heard, "decoding_seconds": taken / heard}
    return found


def _decode_files(files: list[bytes]) -> None:
    for file in files:
        soundfile.read(io.BytesIO(file), dtype="float32")


def _table(figures: dict[str, Any], workers: list[int]) -> Table:
    taken, utterances = figures["seconds"], figures["utterances"]
    hours = figures["seconds_of_audio"] / 3600
    title = (
        f"{device_name()}, {figures['cores']} cores\n"
        f"{figures['corpus']}: {utterances} utterances, {hours:.2f} h, batch {figures['batch']}"
    )
    table = Table(title=title, title_justify="left")
    columns = ("what", "utterances/s", "MB/s", "of decoding alone x workers", "of webdataset")
    for name in columns:
        table.add_column(name, justify="left" if name == "what" else "right")
    processes = {
        f"{name}, {number} workers": max(1, number) for number in workers for name in ("jointfuse", "webdataset")
    }
    for name, time in taken.items():
        row = [name, f"{utterances / time:.0f}", f"{figures['bytes'] / 1e6 / time:.0f}"]
        if name in processes:
            row.append(f"{taken['decoding alone'] / time / processes[name]:.0%}")
        if name.startswith("jointfuse"):
            row.append(f"{taken[name.replace('jointfuse', 'webdataset')] / time:.2f}")
        table.add_row(*row)
    table.add_section()
    for name, figure in figures["formats"].items():
        speed = (
            f"{figure['bytes_a_second'] / 1e3:.1f} kB and {1e3 * figure['decoding_seconds']:.2f} ms a second of audio"
        )
        table.add_row(f"{name}: {speed}")
    return table
