"""Does a corpus hold what it says? Every byte is read again."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from jointfuse.data.checks import contradictions
from jointfuse.data.index import INDEX_DTYPE, UNLABELLED, index_rows, mel_statistics, split_record
from jointfuse.data.mel import SAMPLE_RATE
from jointfuse.data.observe import (
    DIGEST,
    LACKING_CLASS,
    LISTED,
    Observations,
    digest,
    not_numbers,
    observe_classes,
    observe_clip,
    observe_speakers,
    observe_times,
    repeated,
)
from jointfuse.data.parallel import cores, processes, progress
from jointfuse.data.samples import Utterance, parse_utterance
from jointfuse.data.shards import Corpus, read_sidecar
from jointfuse.errors import UserError


@dataclass(frozen=True)
class Report:
    """What was found. `faults` are lines to read, in the order of splits and shards; `observations` are no faults."""

    faults: list[str]
    observations: Observations
    splits: int
    shards: int
    samples: int
    bytes: int


@dataclass
class _Checked:
    """What one shard gave."""

    faults: list[str] = field(default_factory=list)
    observations: Observations = field(default_factory=Observations)
    digests: np.ndarray = field(default_factory=lambda: np.zeros(0, DIGEST))  # (samples of the sidecar,)


def verify(path: str | Path, workers: int | None = None) -> Report:
    """Read the corpus in folder `path` again, list everything that is not as recorded, and observe what it holds.

    Faults: size and SHA-256 of every tar against sidecar and corpus.json; samples that do not fill the tar without
    gaps; a clip that does not decode to 16 kHz mono of its recorded duration, a text to its length, a JSON to its
    sidecar entry, with a known label or none and with numbers that are numbers; dialogues that are not contiguous, in
    turn order, in one shard and one split; an index.bin, counts, speakers and mel statistics that do not follow from
    the sidecars; a stray shard; speakers in two splits of a corpus that says it is speaker-independent.

    Observations: silent and clipped clips, times that run backwards, the same clip twice, speakers across splits, a
    class that a split lacks, and what the build has noted of clips that they do not show any more.

    Raises:
        UserError: there is no corpus to verify.
    """
    corpus = Corpus.open(path, check_sizes=False)
    places = [(split, shard) for split in corpus.splits for shard in corpus.info["splits"][split]["shards"]]
    found: dict[tuple[str, str], _Checked] = {}
    with processes(min(workers or cores(), len(places))) as pool, progress("verifying", len(places), 0) as advance:
        jobs = {
            pool.submit(_check_shard, corpus.path / split / shard["name"], shard, corpus.labels): (split, shard["name"])
            for split, shard in places
        }
        try:
            for job in as_completed(jobs):
                found[jobs.pop(job)] = job.result()
                advance()
        except BrokenProcessPool as error:
            raise UserError("a verifying process was killed; try again with a smaller --workers") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    faults = [f"{corpus.path / 'corpus.json'}: {fault}" for fault in not_numbers(corpus.info)]
    faults += [f"{corpus.path / 'corpus.json'}: {line}" for line in contradictions(corpus.info)]
    observations = Observations()
    for split in corpus.splits:
        for shard in corpus.info["splits"][split]["shards"]:
            faults += found[split, shard["name"]].faults
            observations.add(found[split, shard["name"]].observations)
        faults += _check_split(corpus, split)
    whole = _Whole(corpus, [found[split, shard["name"]].digests for split, shard in places])
    faults += whole.faults()
    whole.observe(observations)
    speakers = {split: corpus.info["splits"][split]["speakers"] for split in corpus.splits}
    for split, line in observe_speakers(speakers):
        if corpus.info.get("speaker_independent"):
            faults.append(f"{corpus.path / split}: {line}; corpus.json says that the splits share no speaker")
        else:
            observations.note("split that shares speakers with train", f"{corpus.path / split}: {line}")
    for split, line in observe_classes(corpus.info["splits"]):
        observations.note(LACKING_CLASS, f"{corpus.path / split}: {line}")
    return Report(
        faults=faults,
        observations=observations,
        splits=len(corpus.splits),
        shards=len(places),
        samples=sum(shard["samples"] for _, shard in places),
        bytes=sum(shard["bytes"] for _, shard in places),
    )


def _check_shard(path: Path, recorded: dict[str, Any], labels: list[str]) -> _Checked:
    """One shard: its tar against its sidecar and against corpus.json."""
    if not path.is_file():
        return _Checked([f"{path}: missing"])
    try:
        sidecar = read_sidecar(path.with_suffix(".json"))
    except UserError as error:
        return _Checked([str(error)])
    faults: list[str] = []
    observations = Observations()
    known = _observed_before(sidecar)
    digests = np.zeros(len(sidecar["samples"]), DIGEST)
    before: Utterance | None = None
    last: dict[str, Any] = {"dialogue": None}
    with path.open("rb") as tar:
        size, sha256 = path.stat().st_size, hashlib.file_digest(tar, "sha256").hexdigest()
        for source, said in (("its sidecar", sidecar), ("corpus.json", recorded)):
            if size != said.get("bytes"):
                faults.append(f"{path}: {size} bytes, {source} says {said.get('bytes')}")
            if sha256 != said.get("sha256"):
                faults.append(f"{path}: SHA-256 {sha256[:12]}…, {source} says {str(said.get('sha256'))[:12]}…")
        if len(sidecar["samples"]) != recorded["samples"]:
            faults.append(f"{path}: {len(sidecar['samples'])} samples, corpus.json says {recorded['samples']}")
        faults += [f"{path.with_suffix('.json')}: {fault}" for fault in not_numbers(sidecar)]
        end = 0
        for number, entry in enumerate(sidecar["samples"]):
            try:
                place = f"{path}: sample {entry['key']}"
                if entry["offset"] != end:
                    faults.append(f"{place} at byte {entry['offset']}: the sample before ends at byte {end}")
                end = entry["offset"] + entry["size"]
                for kind, line in known.get(entry["key"], {}).items():
                    observations.note(kind, f"{place}: {line}")
                digests[number]["key"] = digest(entry["key"].encode())
                digests[number]["dialogue"] = digest(entry["dialogue"].encode())
                if entry["dialogue"] == last["dialogue"] and entry["turn"] <= last["turn"]:
                    turns = f"turn {entry['turn']} after turn {last['turn']}"
                    faults.append(f"{path}: dialogue {entry['dialogue']!r} has {turns}")
                last = entry
                begin = tar.seek(min(entry["offset"], size))
                data = tar.read(min(entry["size"], size - begin))
                utterance, wrong = _check_sample(data, entry, labels)
                faults += [f"{place} at byte {entry['offset']}: {fault}" for fault in wrong]
                if utterance is not None:
                    same = before if before and before.dialogue == utterance.dialogue else None
                    for kind, line in observe_times(utterance, same):
                        observations.note(kind, f"{place}: {line}")
                    digests[number]["text"] = digest(utterance.text.encode()) if utterance.text else 0
                    if utterance.waveform is not None:
                        digests[number]["clip"] = digest(utterance.waveform.tobytes())
                        for kind, line in observe_clip(utterance.waveform):
                            if kind not in known.get(entry["key"], {}):
                                observations.note(kind, f"{place}: {line}")
                before = utterance
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                faults.append(f"{path}: a sidecar entry is not as it should be ({error!r})")
        tar.seek(min(end, size))
        if tar.read().strip(b"\0"):
            faults.append(f"{path}: data that the sidecar does not know after byte {end}")
    return _Checked(faults, observations, digests)


def _observed_before(sidecar: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Key -> kind -> what was observed when the shard was built, of what its clip does not show any more."""
    known: dict[str, dict[str, str]] = {}
    for one in sidecar.get("observed", ()):
        known.setdefault(one["key"], {})[one["kind"]] = one["found"]
    return known


def _check_sample(data: bytes, entry: dict[str, Any], labels: list[str]) -> tuple[Utterance | None, list[str]]:
    """The sample, if it can be read, and its faults."""
    if len(data) < entry["size"]:
        return None, [f"the file ends {entry['size'] - len(data)} bytes early"]
    try:
        utterance = parse_utterance(data)
    except ValueError as error:
        return None, [str(error)]
    return utterance, list(_compare(utterance, entry, labels))


def _compare(utterance: Utterance, entry: dict[str, Any], labels: list[str]) -> Iterator[str]:
    duration = 0.0 if utterance.waveform is None else len(utterance.waveform) / SAMPLE_RATE
    label = None if utterance.label == UNLABELLED else utterance.label
    emotion = utterance.meta.get("emotion")
    read = {
        "key": utterance.key,
        "duration": duration,
        "characters": len(utterance.text),
        "label": label,
        "emotion": emotion,
        "speaker": utterance.speaker,
        "dialogue": utterance.dialogue,
        "turn": utterance.turn,
    }
    for name, value in read.items():
        if value != entry[name]:
            yield f"{name} is {value!r}, the sidecar says {entry[name]!r}"
    if label is None:
        if emotion is not None:
            yield f"emotion is {emotion!r}, though there is no label"
    elif not 0 <= label < len(labels) or labels[label] != emotion:
        yield f"label {label} ({emotion!r}) is not in the corpus's list"
    yield from not_numbers(utterance.meta)


def _check_split(corpus: Corpus, name: str) -> Iterator[str]:
    """What needs all sidecars of a split, read one after the other."""
    split = corpus.split(name)
    listed = {shard.name for shard in split.shards}
    for path in sorted(split.folder.glob("*.tar")):
        if path.name not in listed:
            yield f"{path}: a shard that corpus.json does not list"

    def sidecars() -> Iterator[dict[str, Any]]:
        return (read_sidecar(shard.with_suffix(".json")) for shard in split.shards)

    try:
        samples = (sample for sidecar in sidecars() for sample in sidecar["samples"])
        yield from _check_record(corpus, name, samples)
        mel = corpus.mel or (np.nan, np.nan)
        if name == "train" and not np.allclose(mel_statistics(sidecars()), mel):
            yield f"{corpus.path / 'corpus.json'}: mel mean and deviation do not follow from the sidecars"
        index = index_rows(sidecars(), corpus.speakers).tobytes()
    except UserError:
        return  # told with its shard
    except (KeyError, TypeError, ValueError) as error:
        yield f"{split.folder}: the sidecars do not fit corpus.json ({error!r})"
        return
    try:
        stored = (split.folder / "index.bin").read_bytes()
    except OSError as error:
        yield f"{split.folder / 'index.bin'}: {error.strerror}"
        return
    if stored != index:
        first = _first_difference(stored, index) // INDEX_DTYPE.itemsize
        yield f"{split.folder / 'index.bin'}: differs from the sidecars, first at sample {first}"


def _first_difference(one: bytes, other: bytes) -> int:
    for position, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return position
    return min(len(one), len(other))


def _check_record(corpus: Corpus, split: str, samples: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The numbers of one split in corpus.json."""
    record = split_record(samples, corpus.labels)
    recorded, counted = ({"unlabelled": 0} | one for one in (corpus.info["splits"][split], record))
    for name, value in counted.items():
        if recorded[name] != value:
            said, found = (json.dumps(one, ensure_ascii=False)[:80] for one in (recorded[name], value))
            yield f"{corpus.path / 'corpus.json'}: {name} of {split} is {said}, the sidecars say {found}"


class _Whole:
    """What needs every sample of every split: keys, dialogues and clips that are there more than once.

    Args:
        digests: of each shard, (samples,) of DIGEST, in the order of splits and shards.
    """

    def __init__(self, corpus: Corpus, digests: list[np.ndarray]) -> None:
        self.shards = [shard for split in corpus.splits for shard in corpus.split(split).shards]
        self.first = np.cumsum([0, *map(len, digests)])  # sample of each shard
        self.digests = np.concatenate([np.zeros(0, DIGEST), *digests])
        self._read: tuple[int, dict[str, Any]] | None = None

    def _shard(self, position: int) -> int:
        return int(np.searchsorted(self.first, position, side="right")) - 1

    def _sample(self, position: int) -> dict[str, Any]:
        """The sidecar's entry."""
        shard = self._shard(position)
        if self._read is None or self._read[0] != shard:
            self._read = shard, read_sidecar(self.shards[shard].with_suffix(".json"))
        sample: dict[str, Any] = self._read[1]["samples"][position - self.first[shard]]
        return sample

    def _folder(self, position: int) -> Path:
        return self.shards[self._shard(position)].parent

    def faults(self) -> Iterator[str]:
        """Keys that are there twice in a split, dialogues in pieces or in two splits."""
        for positions in repeated(self.digests["key"]):
            for folder, count in Counter(map(self._folder, positions)).items():
                if count > 1:
                    yield f"{folder}: key {self._sample(positions[0])['key']!r} is there {count} times"
        dialogue = self.digests["dialogue"]
        begins = np.concatenate([[True], dialogue[1:] != dialogue[:-1]]) if len(dialogue) else np.zeros(0, dtype=bool)
        begins[self.first[:-1][self.first[:-1] < len(begins)]] = True
        pieces = np.flatnonzero(begins)
        for group in repeated(dialogue[pieces]):
            name = self._sample(pieces[group[0]])["dialogue"]
            for one, other in pairwise(pieces[group]):
                here, there = self._folder(other), self._folder(one)
                if here == there:
                    numbers = " and ".join(self.shards[self._shard(position)].stem for position in (one, other))
                    yield f"{here}: dialogue {name!r} is in pieces, in {numbers}"
                else:
                    yield f"{here}: dialogue {name!r} is in split {there.name!r} too"

    def observe(self, observations: Observations) -> None:
        """The same clip twice, with what else is the same; across splits it flatters a score."""
        for positions in repeated(self.digests["clip"]):
            one = positions[0]
            for other in positions[1:]:
                across = self._folder(one) != self._folder(other)
                kind = "clip of another split" if across else "clip that is in its split twice"
                if observations.counts[kind] >= LISTED:
                    observations.counts[kind] += 1
                    continue
                pair = [self._sample(position) for position in (one, other)]
                text = "the same text" if self.digests["text"][one] == self.digests["text"][other] else "another text"
                label = "the same label" if pair[0]["emotion"] == pair[1]["emotion"] else "another label"
                there = f"{self._folder(one).name} {pair[0]['key']}"
                place = f"{self.shards[self._shard(other)]}: sample {pair[1]['key']}"
                observations.note(kind, f"{place}: as {there}, with {text} and {label}")
