"""From dialogues to a corpus folder: in parallel, resumable, and with the same bytes every time.

A corpus file under `corpora/` lists rows and knows how to make their sound; everything after that happens here. Each
shard is one job. A job writes its tar and then its sidecar, each under a temporary name first; the sidecar carries a
fingerprint of the rows and of the content of their files, by which a later run recognises finished shards. corpus.json
is written last.
"""

import errno
import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jointfuse.data.contents import Contents
from jointfuse.data.index import FORMAT, UNLABELLED, index_rows, mel_statistics, shard_name, split_record
from jointfuse.data.mel import MelSums, to_pcm
from jointfuse.data.parallel import cores, processes, progress
from jointfuse.data.rows import CorpusSpec, Fault, FaultyClip, ObservedClip, Render, Row
from jointfuse.data.samples import Utterance, write_tar
from jointfuse.data.shards import read_sidecar
from jointfuse.errors import UserError
from jointfuse.files import replacing, write_json
from jointfuse.lock import locked

NO_MEL = {"count": 0, "sum": 0.0, "squares": 0.0}
BUILDER = 3  # raised whenever the same rows would give other bytes
SHARD_FILE = re.compile(
    r"shard-\d{6,}\.(tar|json)|\.(shard-\d{6,}\.(tar|json)|\.shard-\d{6,}\.files|index\.bin)\.part|index\.bin"
    r"|\.shard-\d{6,}\.files"
)


@dataclass(frozen=True)
class _Job:
    path: Path  # of the tar
    rows: list[Row]
    keys: list[str]
    labels: Sequence[str]
    render: Render
    with_mel: bool
    described: str  # hash of all that the shard depends on, but for its rows' files

    @property
    def sidecar(self) -> Path:
        return self.path.with_suffix(".json")

    @property
    def record(self) -> Path:
        """Of the rows' files, while the corpus is not finished."""
        return self.path.with_name(f".{self.path.stem}.files")

    def fingerprint(self, contents: Contents) -> str:
        """Of all that the shard depends on."""
        hashes = [row.file and contents.hash(row.file) for row in self.rows]
        return hashlib.sha256(json.dumps([self.described, hashes]).encode()).hexdigest()


def build(
    spec: CorpusSpec, out: str | os.PathLike[str], workers: int | None = None, samples_per_shard: int = 500
) -> dict[str, Any]:
    """Write `spec` as a corpus folder and return the content of its corpus.json.

    The bytes written do not depend on `workers` (default: one a core) or on how often the build was interrupted.

    Raises:
        UserError: the rows contradict each other (nothing is written then), a clip cannot be used, `out` is taken, or
            the disk is full. Finished shards stay for the next run of the same command; corpus.json is not written.
    """
    out = Path(out)
    if samples_per_shard < 1 or (workers is not None and workers < 1):
        raise UserError("--samples-per-shard and --workers are at least 1")
    check(spec)
    _check_free(spec, out)
    jobs = {split: list(_jobs(spec, split, out / split, samples_per_shard)) for split in spec.splits}
    existed = out.is_dir()
    try:
        for split in spec.splits:
            (out / split).mkdir(parents=True, exist_ok=True)
        with locked(out, wait=False) as alone:
            if not alone:
                raise UserError(f"{out}: another build is writing here; wait for it or choose another --out")
            for split, expected in jobs.items():
                _remove_leftovers(out / split, expected)
            every = [job for expected in jobs.values() for job in expected]
            _run(every, workers or cores(), spec.fresh_process, f"building {spec.name}")
            return _finish(spec, out, jobs)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(f"{out}: {error.strerror}; make room and run the same command again to go on") from error
        raise
    finally:
        for folder in [out / split for split in spec.splits] + ([] if existed else [out]):
            with suppress(OSError):
                folder.rmdir()  # succeeds only where nothing was finished


def check(spec: CorpusSpec) -> None:
    """Refuse rows that cannot become a corpus.

    Raises:
        UserError: no split or an empty one, a split without a label, fewer than two classes to train on, a turn twice,
            a dialogue in two splits.
    """
    if not spec.splits:
        raise UserError(f"{spec.name}: no split at all; give train, dev and test, or one of them")
    if "train" in spec.splits and len(spec.labels) < 2:
        raise UserError(f"{spec.name}: only one class, {spec.labels[0]!r}; a classifier needs two or more")
    home: dict[str, tuple[str, str]] = {}
    for split, dialogues in spec.splits.items():
        if not dialogues:
            raise UserError(f"{spec.name}: split {split!r} has no utterances; leave it out or fill it")
        if all(row.label is None for dialogue in dialogues for row in dialogue):
            raise UserError(f"{spec.name}: no utterance of split {split!r} has a label; leave it out or label some")
        for dialogue in dialogues:
            first = dialogue[0]
            other, origin = home.setdefault(first.dialogue, (split, first.origin))
            if other != split:
                raise UserError(
                    f"{first.origin}: dialogue {first.dialogue!r} is in {split} and in {other} ({origin}); "
                    "keep a dialogue in one split, or, if every table numbers its own, give --dialogues-per-table"
                )
            turns: dict[int, Row] = {}
            for row in dialogue:
                if turns.setdefault(row.turn, row) is not row:
                    raise UserError(
                        f"{row.origin}: turn {row.turn} of dialogue {row.dialogue!r} was given before "
                        f"({turns[row.turn].origin}); number the turns of a dialogue once each"
                    )


def _check_free(spec: CorpusSpec, out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: exists and is not a folder; choose another --out")
    if (out / "corpus.json").exists():
        raise UserError(f"{out}: holds a finished corpus already; choose another --out or delete it first")
    ours = {*spec.splits, ".corpus.json.part"}
    foreign = sorted({entry.name for entry in out.iterdir()} - ours) if out.is_dir() else []
    if foreign:
        raise UserError(f"{out}: holds {foreign[0]!r}, which is no part of this build; choose an empty --out")


# ---------------------------------------------------------------------------------------------------------------- plan


def _jobs(spec: CorpusSpec, split: str, folder: Path, samples_per_shard: int) -> Iterator[_Job]:
    """Fill shards with whole dialogues, in order; one longer than a shard gets a shard of its own."""
    keys = dialogue_keys(split, [dialogue[0].dialogue for dialogue in spec.splits[split]])
    shards: list[list[Row]] = [[]]
    for dialogue in spec.splits[split]:
        if shards[-1] and len(shards[-1]) + len(dialogue) > samples_per_shard:
            shards.append([])
        shards[-1].extend(sorted(dialogue, key=lambda row: row.turn))
    for number, rows in enumerate(shards):
        names = [f"{keys[row.dialogue]}_{row.turn:03d}" for row in rows]
        entries = [
            [key, row.dialogue, row.turn, row.speaker, row.label, row.text, row.start, row.end, row.extra, row.identity]
            for key, row in zip(names, rows, strict=True)
        ]
        content = json.dumps([FORMAT, BUILDER, split, list(spec.labels), entries], sort_keys=True)
        described = hashlib.sha256(content.encode()).hexdigest()
        yield _Job(folder / shard_name(number), rows, names, spec.labels, spec.render, split == "train", described)


def dialogue_keys(split: str, dialogues: list[str]) -> dict[str, str]:
    """Dialogue -> a start for its keys: unique, short enough for a tar header, without dots, slashes or spaces."""
    keys: dict[str, str] = {}
    taken: dict[str, int] = {}  # key -> how often it was wished for
    for dialogue in dialogues:
        name = re.sub(r"[^A-Za-z0-9_-]", "_", dialogue)[:48]
        base = key = name if name.startswith(f"{split}_") else f"{split}_{name}"
        while key in taken:
            taken[base] += 1
            key = f"{base}-{taken[base]}"
        taken[key] = 1
        keys[dialogue] = key
    return keys


def _remove_leftovers(folder: Path, expected: list[_Job]) -> None:
    """Delete what earlier, unfinished runs left and this one will not use."""
    keep = {path.name for job in expected for path in (job.path, job.sidecar, job.record)}
    for path in folder.iterdir():
        if path.name not in keep and SHARD_FILE.fullmatch(path.name):
            path.unlink()


# ----------------------------------------------------------------------------------------------------------------- run


def _finished(job: _Job) -> bool:
    """Is the shard there, and were its rows and their files the same?"""
    try:
        sidecar = read_sidecar(job.sidecar)
        if job.path.stat().st_size != sidecar["bytes"]:
            return False
        same: bool = sidecar.get("source") == job.fingerprint(Contents(job.record))
        return same
    except (OSError, UserError):
        return False


def _work(job: _Job) -> None:
    job.sidecar.unlink(missing_ok=True)  # a stale one must never stand beside a new tar
    contents = Contents(job.record)
    heard = any(row.clip is not None and row.label is not None for row in job.rows)
    mel = MelSums() if job.with_mel and heard else None
    noted: dict[str, list[dict[str, Any]]] = {"faults": [], "observed": []}
    sidecar = write_tar(job.path, _utterances(job, contents, noted), mel)
    contents.check()
    sidecar["source"] = job.fingerprint(contents)
    sidecar |= {name: entries for name, entries in noted.items() if entries}
    if job.with_mel:
        sidecar["mel"] = {"count": mel.count, "sum": mel.sum, "squares": mel.squares} if mel else NO_MEL
    contents.write()
    write_json(job.sidecar, sidecar)


def _utterances(job: _Job, contents: Contents, noted: dict[str, list[dict[str, Any]]]) -> Iterator[Utterance]:
    """The shard's samples. Faults and observations of clips are appended to those of `noted`."""
    for key, row, clip in zip(job.keys, _hashed(job.rows, contents), job.render(job.rows), strict=True):
        label = row.label
        if isinstance(clip, FaultyClip):
            noted["faults"].append(fault_record(job.path.parent.name, key if clip.kept != "nothing" else None, clip))
            if clip.kept == "nothing":
                continue
            if clip.kept == "context":
                label = None
        if isinstance(clip, FaultyClip | ObservedClip):
            noted["observed"] += [{"key": key, "kind": kind, "found": found} for kind, found in clip.observed]
            waveform = clip.waveform
        else:
            waveform = clip
        if waveform is not None and (waveform.size == 0 or not np.isfinite(waveform).all()):
            raise UserError(f"{row.origin}: the clip is empty or holds values that are not numbers; replace it")
        meta = {
            "label": label,
            "emotion": None if label is None else job.labels[label],
            "speaker": row.speaker,
            "dialogue": row.dialogue,
            "turn": row.turn,
            "start": row.start,
            "end": row.end,
            **row.extra,
        }
        samples = None if waveform is None else to_pcm(waveform)
        number = UNLABELLED if label is None else label
        yield Utterance(key, row.text, samples, number, row.speaker, row.dialogue, row.turn, meta)


def _hashed(rows: Sequence[Row], contents: Contents) -> Iterator[Row]:
    """The rows. The file of each is hashed before it is asked for: whatever reads it next finds it in memory."""
    for row in rows:
        if row.file is not None:
            try:
                contents.hash(row.file)
            except OSError as error:
                raise UserError(
                    f"{row.origin}: clip {row.file} cannot be read ({error.strerror}); "
                    "mend that and run the same command again"
                ) from error
        yield row


def fault_record(split: str, key: str | None, fault: Fault | FaultyClip) -> dict[str, Any]:
    """An entry of corpus.json's `faults`; `key` is that of the sample concerned."""
    return {"split": split, "key": key, "file": fault.file, "fault": fault.fault, "done": fault.done}


def _work_alone(job: _Job) -> None:
    """_work in a process of its own. (Python 3.11's max_tasks_per_child=1 would do, but can hang: gh-115634.)"""
    with processes(1, job.render.__module__) as pool:
        pool.submit(_work, job).result()


def _run(jobs: list[_Job], workers: int, fresh_process: bool, title: str) -> None:
    """Do the jobs that are not done yet. The first error ends the run once the jobs under way are through."""
    todo = [job for job in jobs if not _finished(job)]
    with progress(title, len(jobs), len(jobs) - len(todo)) as advance:
        if not todo:
            return
        workers = min(workers, len(todo))
        pool: Executor = ThreadPoolExecutor(workers) if fresh_process else processes(workers, todo[0].render.__module__)
        try:
            for future in as_completed([pool.submit(_work_alone if fresh_process else _work, job) for job in todo]):
                future.result()
                advance()
        except KeyboardInterrupt:
            print(
                "stopping after the shards under way; the same command goes on from there", file=sys.stderr, flush=True
            )
            raise
        except BrokenProcessPool as error:
            raise UserError(
                "a building process was killed, probably for want of memory; try again with a smaller --workers"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


# -------------------------------------------------------------------------------------------------------------- finish


def _finish(spec: CorpusSpec, out: Path, jobs: dict[str, list[_Job]]) -> dict[str, Any]:
    speakers = sorted({row.speaker for split in spec.splits.values() for dialogue in split for row in dialogue})
    mel = None
    splits = {}
    observed = Counter[str]()
    faults = [fault_record(fault.split, None, fault) for fault in spec.faults if fault.split not in spec.splits]
    for split, expected in jobs.items():
        with replacing(out / split / "index.bin") as file:
            file.write(index_rows(_sidecars(expected), speakers).tobytes())
        samples = (sample for sidecar in _sidecars(expected) for sample in sidecar["samples"])
        faults += _faults(spec, split, expected)
        observed.update(one["kind"] for sidecar in _sidecars(expected) for one in sidecar.get("observed", ()))
        splits[split] = split_record(samples, spec.labels) | {
            "shards": [
                {
                    "name": job.path.name,
                    "samples": len(sidecar["samples"]),
                    "bytes": sidecar["bytes"],
                    "sha256": sidecar["sha256"],
                }
                for job, sidecar in zip(expected, _sidecars(expected), strict=True)
            ]
        }
        if not splits[split]["samples"]:
            raise UserError(f"{out / split}: every clip was left out, the last because it {faults[-1]['fault']}")
        if split == "train":
            mel = dict(zip(("mean", "deviation"), mel_statistics(_sidecars(expected)), strict=True))
    info = {
        "format": FORMAT,
        "builder": BUILDER,
        "name": spec.name,
        "description": spec.description,
        "source": spec.source,
        "licence": spec.licence,
        "synthetic": spec.synthetic,
        **({"speaker_independent": True} if spec.speaker_independent else {}),
        "labels": list(spec.labels),
        "mel": mel,
        "splits": splits,
        **({"rows": _rows(spec, splits, jobs)} if spec.rows else {}),
        "speakers": speakers,
        "faults": faults,
        "observed": dict(sorted(observed.items())),
    }
    for job in (job for expected in jobs.values() for job in expected):
        job.record.unlink(missing_ok=True)
    write_json(out / "corpus.json", info)
    return info


def _rows(
    spec: CorpusSpec, splits: Mapping[str, Mapping[str, Any]], jobs: Mapping[str, list[_Job]]
) -> dict[str, dict[str, int]]:
    """What became of the rows of the source, by split; those of none stand under ""."""
    rows = {}
    for split, counts in spec.rows.items():
        utterances = splits[split]["samples"] if split in splits else 0
        lost = {reason: count for reason, count in counts.items() if reason != "read"}
        if damaged := sum(len(job.rows) for job in jobs.get(split, ())) - utterances:
            lost["damaged clips"] = damaged
        assert counts["read"] == utterances + sum(lost.values()), (split, counts, utterances)
        rows[split] = {"read": counts["read"], "utterances": utterances, **lost}
    return rows


def _sidecars(jobs: list[_Job]) -> Iterator[dict[str, Any]]:
    """One after the other, read again for each use: those of a large split do not fit into memory together."""
    return (read_sidecar(job.sidecar) for job in jobs)


def _faults(spec: CorpusSpec, split: str, jobs: list[_Job]) -> list[dict[str, Any]]:
    """What was wrong in one split: first what concerns no utterance, then the utterances' own in their order."""
    known = [fault for fault in spec.faults if fault.split == split]
    concerned = {fault.utterance for fault in known}
    found: list[dict[str, Any]] = []
    key_of: dict[tuple[str, int] | None, str | None] = {None: None}
    place: dict[str | None, int] = {None: -1}
    number = 0
    for sidecar in _sidecars(jobs):
        faults = sidecar.get("faults", [])
        found += faults
        faulty = {fault["key"] for fault in faults}
        for sample in sidecar["samples"]:
            key, utterance = sample["key"], (sample["dialogue"], sample["turn"])
            if utterance in concerned:
                key_of[utterance] = key
            if utterance in concerned or key in faulty:
                place[key] = number
            number += 1
    given = [fault_record(split, key_of[fault.utterance], fault) for fault in known]
    return sorted(given + found, key=lambda fault: place[fault["key"]])
