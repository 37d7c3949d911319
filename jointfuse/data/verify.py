"""Does a corpus hold what it says? Every byte is read again."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jointfuse.data.index import INDEX_DTYPE, index_rows, mel_statistics, split_record
from jointfuse.data.parallel import cores, processes, progress
from jointfuse.data.shards import SAMPLE_RATE, Corpus, parse_utterance, read_sidecar
from jointfuse.errors import UserError


@dataclass(frozen=True)
class Report:
    """What was found. `faults` are lines to read, in the order of splits and shards."""

    faults: list[str]
    splits: int
    shards: int
    samples: int
    bytes: int


def verify(path: str | Path, workers: int | None = None) -> Report:
    """Read the corpus in folder `path` again and list everything that is not as recorded.

    Checked: size and SHA-256 of every tar against sidecar and corpus.json; that samples fill the tar without gaps;
    that every clip decodes to finite 16 kHz mono of its recorded duration, every text to its length, every JSON to its
    sidecar entry, with a known label; that dialogues are contiguous, in turn order, in one shard and one split; that
    index.bin, the counts, the speakers and the mel statistics follow from the sidecars; that no stray shard lies about.

    Raises:
        UserError: there is no corpus to verify.
    """
    corpus = Corpus.open(path, check_sizes=False)
    places = [(split, shard) for split in corpus.splits for shard in corpus.info["splits"][split]["shards"]]
    found: dict[tuple[str, str], list[str]] = {}
    with processes(min(workers or cores(), len(places))) as pool, progress("verifying", len(places), 0) as advance:
        jobs = {
            pool.submit(_check_shard, corpus.path / split / shard["name"], shard, corpus.labels): (split, shard["name"])
            for split, shard in places
        }
        try:
            for job in as_completed(jobs):
                found[jobs[job]] = job.result()
                advance()
        except BrokenProcessPool as error:
            raise UserError("a verifying process was killed; try again with a smaller --workers") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    faults = []
    home: dict[str, str] = {}
    for split in corpus.splits:
        faults += [fault for shard in corpus.info["splits"][split]["shards"] for fault in found[split, shard["name"]]]
        faults += _check_split(corpus, split, home)
    return Report(
        faults=faults,
        splits=len(corpus.splits),
        shards=len(places),
        samples=sum(shard["samples"] for _, shard in places),
        bytes=sum(shard["bytes"] for _, shard in places),
    )


def _check_shard(path: Path, recorded: dict[str, Any], labels: list[str]) -> list[str]:
    """The faults of one shard: its tar against its sidecar and against corpus.json."""
    if not path.is_file():
        return [f"{path}: missing"]
    try:
        sidecar = read_sidecar(path.with_suffix(".json"))
    except UserError as error:
        return [str(error)]
    faults = []
    with path.open("rb") as tar:
        size, digest = path.stat().st_size, hashlib.file_digest(tar, "sha256").hexdigest()
        for source, said in (("its sidecar", sidecar), ("corpus.json", recorded)):
            if size != said.get("bytes"):
                faults.append(f"{path}: {size} bytes, {source} says {said.get('bytes')}")
            if digest != said.get("sha256"):
                faults.append(f"{path}: SHA-256 {digest[:12]}…, {source} says {str(said.get('sha256'))[:12]}…")
        if len(sidecar["samples"]) != recorded["samples"]:
            faults.append(f"{path}: {len(sidecar['samples'])} samples, corpus.json says {recorded['samples']}")
        end = 0
        for entry in sidecar["samples"]:
            try:
                place = f"{path}: sample {entry['key']} at byte {entry['offset']}"
                if entry["offset"] != end:
                    faults.append(f"{place}: the sample before ends at byte {end}")
                end = entry["offset"] + entry["size"]
                tar.seek(entry["offset"])
                faults += [f"{place}: {fault}" for fault in _check_sample(tar.read(entry["size"]), entry, labels)]
            except (KeyError, TypeError, ValueError) as error:
                faults.append(f"{path}: a sidecar entry is not as it should be ({error!r})")
        tar.seek(end)
        if tar.read().strip(b"\0"):
            faults.append(f"{path}: data that the sidecar does not know after byte {end}")
    return faults


def _check_sample(data: bytes, entry: dict[str, Any], labels: list[str]) -> Iterator[str]:
    if len(data) < entry["size"]:
        yield f"the file ends {entry['size'] - len(data)} bytes early"
        return
    try:
        utterance = parse_utterance(data)
    except ValueError as error:
        yield str(error)
        return
    duration = 0.0 if utterance.waveform is None else len(utterance.waveform) / SAMPLE_RATE
    read = {
        "key": utterance.key,
        "duration": duration,
        "characters": len(utterance.text),
        "label": utterance.label,
        "emotion": utterance.meta.get("emotion"),
        "speaker": utterance.speaker,
        "dialogue": utterance.dialogue,
        "turn": utterance.turn,
    }
    for name, value in read.items():
        if value != entry[name]:
            yield f"{name} is {value!r}, the sidecar says {entry[name]!r}"
    if not 0 <= utterance.label < len(labels) or labels[utterance.label] != utterance.meta.get("emotion"):
        yield f"label {utterance.label} ({utterance.meta.get('emotion')!r}) is not in the corpus's list"


def _check_split(corpus: Corpus, name: str, home: dict[str, str]) -> Iterator[str]:
    """What needs a whole split's sidecars. `home`: dialogue -> split, of the splits seen so far."""
    split = corpus.split(name)
    listed = {shard.name for shard in split.shards}
    for path in sorted(split.folder.glob("*.tar")):
        if path.name not in listed:
            yield f"{path}: a shard that corpus.json does not list"
    try:
        sidecars = [read_sidecar(shard.with_suffix(".json")) for shard in split.shards]
    except UserError:
        return  # told with its shard
    samples = [sample for sidecar in sidecars for sample in sidecar["samples"]]
    try:
        yield from _check_dialogues(split.folder, sidecars, home, name)
        yield from _check_record(corpus, name, samples)
        index = index_rows(sidecars, corpus.speakers)
        if name == "train" and not np.allclose(mel_statistics(sidecars), (corpus.mel_mean, corpus.mel_deviation)):
            yield f"{corpus.path / 'corpus.json'}: mel mean and deviation do not follow from the sidecars"
    except (KeyError, TypeError, ValueError) as error:
        yield f"{split.folder}: the sidecars do not fit corpus.json ({error!r})"
        return
    try:
        stored = (split.folder / "index.bin").read_bytes()
    except OSError as error:
        yield f"{split.folder / 'index.bin'}: {error.strerror}"
        return
    if stored != index.tobytes():
        first = _first_difference(stored, index.tobytes()) // INDEX_DTYPE.itemsize
        yield f"{split.folder / 'index.bin'}: differs from the sidecars, first at sample {first}"


def _first_difference(one: bytes, other: bytes) -> int:
    for position, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return position
    return min(len(one), len(other))


def _check_dialogues(folder: Path, sidecars: list[dict[str, Any]], home: dict[str, str], split: str) -> Iterator[str]:
    seen: dict[str, int] = {}
    for number, sidecar in enumerate(sidecars):
        last, turn = None, -1
        for sample in sidecar["samples"]:
            dialogue = sample["dialogue"]
            if dialogue != last:
                if dialogue in seen:
                    yield f"{folder}: dialogue {dialogue!r} is in pieces, in shard {seen[dialogue]} and shard {number}"
                if home.setdefault(dialogue, split) != split:
                    yield f"{folder}: dialogue {dialogue!r} is in split {home[dialogue]!r} too"
                seen[dialogue], last = number, dialogue
            elif sample["turn"] <= turn:
                yield f"{folder}: dialogue {dialogue!r} has turn {sample['turn']} after turn {turn}"
            turn = sample["turn"]
    keys = Counter(sample["key"] for sidecar in sidecars for sample in sidecar["samples"])
    yield from (f"{folder}: key {key!r} is there {count} times" for key, count in keys.items() if count > 1)


def _check_record(corpus: Corpus, split: str, samples: list[dict[str, Any]]) -> Iterator[str]:
    """The numbers of one split in corpus.json."""
    info = corpus.info["splits"][split]
    for name, value in split_record(samples, corpus.labels).items():
        if info[name] != value:
            said, found = (json.dumps(one, ensure_ascii=False)[:80] for one in (info[name], value))
            yield f"{corpus.path / 'corpus.json'}: {name} of {split} is {said}, the sidecars say {found}"
