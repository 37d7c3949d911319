"""A corpus on disk: WebDataset tars with an index beside them. The format and its readers; samples.py makes the tars.

    corpus.json              labels in order, splits, counts, mel mean and deviation (null without a training split),
                             source, licence, faults of what it was made from
    train/shard-000000.tar   KEY.flac (16 kHz mono) · KEY.json · KEY.txt, sample after sample
    train/shard-000000.json  sidecar: byte span, duration, label, speaker, dialogue of every sample; the tar's SHA-256
    train/index.bin          the split as one memory-mapped array of INDEX_DTYPE

A turn without a label (null) is heard before those behind it, and is in no way trained on or scored.
A dialogue is contiguous, in turn order, and lies in one shard. Nothing read from a corpus is unpickled, and no name
inside a tar is used as a path.
"""

import os
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jointfuse.data.cache import ShardCache
from jointfuse.data.checks import contradictions, index_fault, row_fault
from jointfuse.data.index import INDEX_DTYPE, UNLABELLED
from jointfuse.data.records import CheckedSidecar, CorpusRecord
from jointfuse.data.samples import Utterance, members_of, parse_utterance
from jointfuse.data.texts import last_text, most_bytes_of
from jointfuse.errors import PassingFault, UserError
from jointfuse.files import read_json
from jointfuse.patience import PATIENCE, patiently

OPEN_TARS = 64  # kept open by one Split in one process
SIDECARS_KEPT = 8
AGAIN = "copy the corpus again or build it again"


class _Handle:
    """A file descriptor that closes when its last user lets go of it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


def read_sidecar(path: Path, patience: float = PATIENCE) -> dict[str, Any]:
    """A shard's sidecar. Raises UserError, PassingFault."""
    return dict(read_json(path, CheckedSidecar, AGAIN, patience))


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
            return members_of(data)[1].get("flac")
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
