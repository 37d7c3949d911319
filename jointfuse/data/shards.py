"""A corpus on disk: WebDataset tars with an index beside them. The format, the shard writer and the readers.

    corpus.json              labels in order, splits, counts, mel mean and deviation (null without a training split),
                             source, licence, faults of what it was made from
    train/shard-000000.tar   KEY.flac (16 kHz mono) · KEY.json · KEY.txt, sample after sample
    train/shard-000000.json  sidecar: byte span, duration, label, speaker, dialogue of every sample; the tar's SHA-256
    train/index.bin          the split as one memory-mapped array of INDEX_DTYPE

A turn without a label (null) is heard before those behind it, and is in no way trained on or scored.
A dialogue is contiguous, in turn order, and lies in one shard. Nothing read from a corpus is unpickled, and no name
inside a tar is used as a path.
"""

import hashlib
import io
import json
import os
import tarfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import soundfile

from jointfuse.data.cache import ShardCache
from jointfuse.data.checks import contradictions, index_fault, row_fault
from jointfuse.data.index import INDEX_DTYPE, UNLABELLED
from jointfuse.data.mel import SAMPLE_RATE, MelSums
from jointfuse.data.records import CheckedSidecar, CorpusRecord, Meta
from jointfuse.data.sound import reason
from jointfuse.data.texts import last_text, most_bytes_of
from jointfuse.errors import PassingFault, UserError
from jointfuse.files import parse_json, read_json, replacing
from jointfuse.patience import PATIENCE, patiently

OPEN_TARS = 64  # kept open by one Split in one process
SIDECARS_KEPT = 8
AGAIN = "copy the corpus again or build it again"


@dataclass(frozen=True)
class Utterance:
    """One turn of a dialogue.

    `waveform` is (S,) int16 at 16 kHz, or None without a clip; `text` is empty without a text; `label` is UNLABELLED
    without a label; `meta` is the sample's whole JSON member.
    """

    key: str
    text: str
    waveform: np.ndarray | None
    label: int
    speaker: str
    dialogue: str
    turn: int
    meta: dict[str, Any]


# ------------------------------------------------------------------------------------------------------------ writing


class _HashingFile:
    """A binary file that hashes what passes through it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        self.bytes += len(data)
        return self.file.write(data)


_BLANK = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)
_NAME, _SIZE, _CHECKSUM = slice(0, 100), slice(124, 135), slice(148, 156)  # in a header


def _header(name: str, size: int) -> bytes:
    """The tar header of a file of mode 644, without time and owner.

    tarfile's own bytes; made by it they take longer than hashing and writing what follows them.
    """
    if not name.isascii() or len(name) > 100 or size >= 8**11:
        info = tarfile.TarInfo(name)
        info.size = size
        return info.tobuf(tarfile.PAX_FORMAT)
    header = bytearray(_BLANK)
    header[_NAME] = name.encode().ljust(100, b"\0")
    header[_SIZE] = b"%011o" % size
    header[_CHECKSUM] = b"        "  # as which it counts in its own sum
    header[_CHECKSUM] = b"%06o\0 " % sum(header)
    return bytes(header)


def write_tar(path: Path, utterances: Iterable[Utterance], mel: MelSums | None = None) -> dict[str, Any]:
    """Write one tar and return its sidecar: {"sha256", "bytes", "samples": [...]}.

    The bytes depend on the utterances alone: members are sorted, times, owners and modes fixed. `mel` is
    given every clip of a labelled utterance.
    """
    samples = []
    with replacing(path) as file:
        tar = _HashingFile(file)
        for utterance in utterances:
            offset = tar.bytes
            members = {
                "txt": utterance.text.encode(),
                "json": json.dumps(utterance.meta, ensure_ascii=False, sort_keys=True).encode(),
            }
            duration = 0.0
            if utterance.waveform is not None:
                flac = io.BytesIO()
                soundfile.write(flac, utterance.waveform, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
                members["flac"] = flac.getvalue()
                duration = len(utterance.waveform) / SAMPLE_RATE
                if mel is not None and utterance.label != UNLABELLED:
                    mel.add(utterance.waveform)
            written = []
            for extension, content in sorted(members.items()):
                padding = bytes(-len(content) % tarfile.BLOCKSIZE)
                written += [_header(f"{utterance.key}.{extension}", len(content)), content, padding]
            tar.write(b"".join(written))
            samples.append(
                {
                    "key": utterance.key,
                    "offset": offset,
                    "size": tar.bytes - offset,
                    "duration": duration,
                    "characters": len(utterance.text),
                    "label": None if utterance.label == UNLABELLED else utterance.label,
                    "emotion": utterance.meta["emotion"],
                    "speaker": utterance.speaker,
                    "dialogue": utterance.dialogue,
                    "turn": utterance.turn,
                }
            )
        tar.write(bytes(2 * tarfile.BLOCKSIZE))
        tar.write(bytes(-tar.bytes % tarfile.RECORDSIZE))
    return {"sha256": tar.hash.hexdigest(), "bytes": tar.bytes, "samples": samples}


# ------------------------------------------------------------------------------------------------------------ reading


class _Handle:
    """A file descriptor that closes when its last user lets go of it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


def read_sidecar(path: Path, patience: float = PATIENCE) -> dict[str, Any]:
    """A shard's sidecar. Raises UserError, PassingFault."""
    return dict(read_json(path, CheckedSidecar, AGAIN, patience))


def decode_flac(data: bytes) -> np.ndarray:
    """FLAC bytes to (S,) int16. Raises ValueError unless they are a 16 kHz mono clip that is not empty."""
    try:
        waveform, rate = soundfile.read(io.BytesIO(data), dtype="int16")
    except soundfile.SoundFileError as error:
        raise ValueError(f"its audio does not decode ({reason(error)})") from error
    except MemoryError as error:
        raise ValueError("its audio does not decode (its header promises more than fits into memory)") from error
    if rate != SAMPLE_RATE or waveform.ndim != 1:
        raise ValueError(f"its audio is not {SAMPLE_RATE} Hz mono")
    if waveform.size == 0:
        raise ValueError("its audio is empty")
    return waveform


def _members(data: bytes) -> tuple[str, dict[str, bytes]]:
    """Key and {extension: content} of one sample's bytes. Raises ValueError."""
    keys, members = set(), {}
    try:
        for name, content in _plain_files(data) or _files(data):
            key, _, extension = name.partition(".")
            keys.add(key)
            members[extension] = content
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"not a piece of a tar: {error}") from error
    if len(keys) != 1:
        raise ValueError(f"its bytes hold {len(keys)} samples instead of one")
    return keys.pop(), members


def _plain_files(data: bytes) -> list[tuple[str, bytes]] | None:
    """(name, content) of each member, without the many things that tarfile looks after; None where that takes tarfile:
    a header that is not plain POSIX ustar, a name outside ASCII or of over 100 bytes."""
    files, begin = [], 0
    while begin < len(data):
        header = data[begin : begin + tarfile.BLOCKSIZE]
        try:
            name = header[:100].rstrip(b"\0").decode("ascii")
            size = int(header[124:135], 8)
        except ValueError:
            return None
        begin += tarfile.BLOCKSIZE
        end = begin + size
        if header[156:157] != tarfile.REGTYPE or header[345] or end > len(data):
            return None
        files.append((name, data[begin:end]))
        begin = end + -size % tarfile.BLOCKSIZE
    return files


def _files(data: bytes) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in tar:
            content = tar.extractfile(member)
            if content is None:
                raise tarfile.ReadError(f"{member.name!r} is not a file")
            yield member.name, content.read()


def parse_utterance(data: bytes, audio: bool = True) -> Utterance:
    """One sample's bytes, tar headers included, decoded. Raises ValueError saying what is wrong with them."""
    key, members = _members(data)
    clip = members.get("flac") if audio else None
    for needed in ("json", "txt"):
        if needed not in members:
            raise ValueError(f"'{needed}' is missing")
    try:
        meta = parse_json(members["json"], Meta)
    except ValueError as error:
        raise ValueError(f"its JSON is not as it should be: {error}") from error
    return Utterance(
        key=key,
        text=members["txt"].decode(),
        waveform=None if clip is None else decode_flac(clip),
        label=UNLABELLED if meta["label"] is None else meta["label"],
        speaker=meta["speaker"],
        dialogue=meta["dialogue"],
        turn=meta["turn"],
        meta=dict(meta),
    )


class Split:
    """One split of a corpus, sample by sample. May be pickled and forked: files are opened where they are read."""

    def __init__(
        self,
        corpus: Path,
        name: str,
        info: dict[str, Any],
        speakers: int,
        cache: ShardCache | None = None,
        patience: float = PATIENCE,
    ) -> None:
        self.corpus, self.name, self.info, self.speakers = corpus, name, info, speakers
        self.cache, self.patience = cache, patience
        self.folder = corpus / name
        self.labels = len(info["label_counts"])
        self.shards = [self.folder / shard["name"] for shard in info["shards"]]
        self.shard_sizes: list[int] = [shard["samples"] for shard in info["shards"]]
        self._first = [0, *accumulate(self.shard_sizes)]  # sample of each shard
        self._index: np.ndarray | None = None
        self._handles: dict[int, _Handle] = {}
        self._keys: dict[int, list[str]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memmap would carry the whole index.
        return {**self.__dict__, "_index": None, "_handles": {}, "_keys": {}}

    def __len__(self) -> int:
        return int(self.info["samples"])

    @property
    def index(self) -> np.ndarray:
        """(samples,) of INDEX_DTYPE, memory-mapped."""
        if self._index is None:
            self._index = self.open_index()
        return self._index

    def open_index(self) -> np.ndarray:
        """Map the index, without reading it. Raises UserError where it is missing or of another length."""
        path = self.folder / "index.bin"
        try:
            # As a plain array: a memmap takes four times as long to name an entry.
            mapped = patiently(lambda: np.memmap(path, dtype=INDEX_DTYPE, mode="r"), str(path), self.patience)
            index = mapped.view(np.ndarray)
        except OSError as error:
            raise UserError(f"{path}: the index cannot be read ({error.strerror}); {AGAIN}") from error
        except ValueError as error:
            raise UserError(f"{path}: the index is empty or cut off within an entry; {AGAIN}") from error
        if len(index) != len(self):
            raise UserError(f"{path}: {len(index)} entries, corpus.json says {len(self)}; {AGAIN}")
        return index

    def check_index(self) -> None:
        """Look at every entry of the index, for whoever reads all of them anyway. Raises UserError."""
        if fault := index_fault(self.index, self.info["shards"], self.labels, self.speakers):
            raise UserError(f"{self.folder / 'index.bin'}: {fault}; {AGAIN}")

    def check_labels(self, labels: np.ndarray) -> None:
        """Raises UserError where a label of the index, (n,), is none of the corpus."""
        if (wrong := (labels >= self.labels) & (labels != UNLABELLED)).any():
            label = int(labels[wrong.argmax()])
            raise UserError(f"{self.folder / 'index.bin'}: label {label} of {self.labels}; {AGAIN}")

    def sample(self, i: int, audio: bool = True) -> Utterance:
        """Sample `i`, its clip decoded if `audio`. Raises UserError with shard, key and offset if it is damaged."""
        data = self.read(i)
        try:
            return self._parsed(i, data, audio)
        except ValueError as error:
            if not self.cache:
                raise self._damaged(i, str(error)) from error
        # What was whole when it was fetched has gone bad on this machine's disk.
        self.cache.drop(self.info["shards"][int(self.index[i]["shard"])])
        data = self.read(i)
        try:
            return self._parsed(i, data, audio)
        except ValueError as error:
            raise self._damaged(i, str(error)) from error

    def text(self, i: int) -> str:
        """Sample `i`'s text. Of its bytes only the last are read, where the text is; of tars that lie elsewhere the
        cache fetches whole ones, as training then does. Raises UserError as `sample`."""
        characters = int(self.index[i]["characters"])
        if not characters:
            return ""
        text = last_text(self.read(i, last=most_bytes_of(characters)), characters)
        return self.sample(i, audio=False).text if text is None else text

    def _parsed(self, i: int, data: bytes, audio: bool) -> Utterance:
        utterance = parse_utterance(data, audio)
        if utterance.label != (label := int(self.index[i]["label"])):
            raise ValueError(f"its label is {utterance.label}, index.bin says {label}")
        return utterance

    def turns_before(self, i: int, number: int) -> list[Utterance]:
        """Up to so many turns before sample `i` in its dialogue, in order, without their clips."""
        first = max(0, i - number)
        same = self.index["dialogue"][first:i] == self.index[i]["dialogue"]
        return [self.sample(turn, audio=False) for turn in range(i - int(same.sum()), i)]

    def characters_before(self, ids: np.ndarray, number: int) -> np.ndarray:
        """Ids of any shape -> int64 of that shape: the characters of the texts that `turns_before` gives."""
        characters = np.zeros(ids.shape, dtype=np.int64)
        for turns in range(1, number + 1):
            before = np.maximum(ids - turns, 0)
            same = (self.index["dialogue"][before] == self.index["dialogue"][ids]) & (ids >= turns)
            characters += same * self.index["characters"][before]
        return characters

    def audio_bytes(self, i: int) -> bytes | None:
        """Sample `i`'s clip as it is stored (FLAC), or None without a clip."""
        data = self.read(i)
        try:
            return _members(data)[1].get("flac")
        except ValueError as error:
            raise self._damaged(i, str(error)) from error

    def key(self, i: int) -> str:
        """Sample `i`'s key, from the shard's sidecar."""
        shard = bisect_right(self._first, i % len(self)) - 1
        keys = self._keys.get(shard)
        if keys is None:
            if len(self._keys) >= SIDECARS_KEPT:
                self._keys.clear()
            sidecar = read_sidecar(self.shards[shard].with_suffix(".json"), self.patience)
            keys = self._keys[shard] = [sample["key"] for sample in sidecar["samples"]]
            if len(keys) != self.shard_sizes[shard]:
                path, wanted = self.shards[shard].with_suffix(".json"), self.shard_sizes[shard]
                raise UserError(f"{path}: {len(keys)} samples, corpus.json says {wanted}; {AGAIN}")
        return keys[i % len(self) - self._first[shard]]

    def read(self, i: int, last: int | None = None) -> bytes:
        """Sample `i`'s bytes, tar headers included, or the `last` so many of them.

        Raises:
            UserError: with shard, key and offset.
            PassingFault: the tar was away for too long.
        """
        shard, offset, size = self._place(i)
        if last is not None and last < size:
            offset, size = offset + size - last, last

        def read() -> bytes:
            try:
                handle = self._opened(shard)  # closed once nothing holds it
                return os.pread(handle.descriptor, size, offset)
            except OSError:
                self._handles.pop(shard, None)  # open on a file system that has gone, perhaps
                raise

        try:
            data = patiently(read, str(self.shards[shard]), self.patience)
        except OSError as error:
            raise self._damaged(i, error.strerror or str(error)) from error
        if len(data) < size:
            raise self._damaged(i, f"the file ends {size - len(data)} bytes early")
        return data

    def _place(self, i: int) -> tuple[int, int, int]:
        """Shard, offset and size of sample `i`. Raises UserError where the index points out of its tars."""
        entry = self.index[i]
        shard, offset, size, _, _, label, *_ = entry.item()
        sound = shard < len(self.shards) and offset + size <= self.info["shards"][shard]["bytes"]
        if not sound or not (label < self.labels or label == UNLABELLED):
            every = np.array([one["bytes"] for one in self.info["shards"]], dtype=np.uint64)
            fault = row_fault(np.array([entry]), i % len(self), every, self.labels)
            raise UserError(f"{self.folder / 'index.bin'}: {fault}; {AGAIN}")
        return shard, offset, size

    def read_ahead(self, ids: Sequence[int]) -> None:
        """Have the system fetch, all at once and in the order of the disk, what `read` is going to be asked for."""
        if self.cache or not hasattr(os, "posix_fadvise"):
            return
        for i in sorted(ids):
            with suppress(OSError, UserError):  # reading it names what is wrong
                shard, offset, size = self._place(i)
                os.posix_fadvise(self._opened(shard).descriptor, offset, size, os.POSIX_FADV_WILLNEED)

    def _opened(self, shard: int) -> _Handle:
        """A shard's tar. Those used last stay open, but not in a cache, where they would take room when given up."""
        if self.cache:
            return _Handle(self.cache.open(self.name, self.info["shards"][shard]))
        handle = self._handles.pop(shard, None)
        if handle is None:
            if len(self._handles) >= OPEN_TARS:
                del self._handles[next(iter(self._handles))]
            handle = _Handle(os.open(self.shards[shard], os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)))
        self._handles[shard] = handle
        return handle

    def _damaged(self, i: int, why: str) -> UserError:
        place = f"{self.folder}: sample {i}"
        with suppress(UserError, PassingFault, LookupError):
            entry = self.index[i]
            place = f"{self.shards[int(entry['shard'])]}: sample {i} at byte {int(entry['offset'])}"
            place = f"{self.shards[int(entry['shard'])]}: sample {self.key(i)} at byte {int(entry['offset'])}"
        return UserError(f"{place} cannot be read ({why}); `tools/verify_shards.py {self.corpus}` lists every damage")


class Described(Protocol):
    """A corpus, or several read as one."""

    path: Any
    mel: tuple[float, float] | None


def mel_of_training(corpus: Described) -> tuple[float, float]:
    """Mel mean and deviation of what is trained on. Raises UserError without a training split."""
    if corpus.mel is None:
        raise UserError(
            f"{corpus.path}: without a training split there are no mel statistics; a model can be scored on this "
            "corpus, with its own"
        )
    return corpus.mel


class Corpus:
    """A finished corpus folder."""

    def __init__(
        self, path: Path, info: dict[str, Any], cache: ShardCache | None = None, patience: float = PATIENCE
    ) -> None:
        self.path, self.info, self.cache, self.patience = path, info, cache, patience
        self.name: str = info["name"]
        self.labels: list[str] = info["labels"]
        self.speakers: list[str] = info["speakers"]
        self.splits: list[str] = list(info["splits"])
        self.unlabelled = any(split.get("unlabelled") for split in info["splits"].values())
        mel = info["mel"]
        self.mel = None if mel is None else (float(mel["mean"]), float(mel["deviation"]))  # of the training split

    @property
    def mel_mean(self) -> float:
        return mel_of_training(self)[0]

    @property
    def mel_deviation(self) -> float:
        return mel_of_training(self)[1]

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        check_sizes: bool = True,
        cache: ShardCache | None = None,
        patience: float = PATIENCE,
    ) -> "Corpus":
        """Open the corpus in folder `path`.

        Args:
            check_sizes: see that its counts add up and look at every shard's size, without reading it.
            cache: where the shards come from when they are not in that folder; no sizes are looked at then.
            patience: seconds for a disk that is away to come back.

        Raises:
            UserError: there is no finished corpus of this format there, or a shard is missing or of another size.
        """
        path = Path(path)
        file = path / "corpus.json"
        if not patiently(path.is_dir, str(path), patience):
            raise UserError(f"{path}: no such folder; a corpus is made by `tools/build_shards.py`")
        if not patiently(file.is_file, str(file), patience):
            raise UserError(
                f"{path}: no corpus.json, so this is no corpus or its building never ended; "
                "run the `tools/build_shards.py` command that makes it (again)"
            )
        corpus = cls(path, dict(read_json(file, CorpusRecord, AGAIN, patience)), cache, patience)
        if check_sizes:
            for contradiction in contradictions(corpus.info):
                raise UserError(f"{file}: {contradiction}; {AGAIN}")
            if not cache:
                corpus._check_sizes()
        return corpus

    def split(self, name: str) -> Split:
        """The split called `name`. Raises UserError with the names there are."""
        if name not in self.info["splits"]:
            raise UserError(f"{self.path}: no split {name!r}; there are {', '.join(self.splits)}")
        return Split(self.path, name, self.info["splits"][name], len(self.speakers), self.cache, self.patience)

    def _check_sizes(self) -> None:
        for split, info in self.info["splits"].items():
            for shard in info["shards"]:
                path = self.path / split / shard["name"]
                try:
                    size = patiently(path.stat, str(path), self.patience).st_size
                except OSError as error:
                    raise UserError(f"{path}: {error.strerror}; {AGAIN}") from error
                if size != shard["bytes"]:
                    raise UserError(
                        f"{path}: {size} bytes, corpus.json says {shard['bytes']}: truncated or replaced; {AGAIN}"
                    )
