"""Whether what a training is going to read is what was built, looked at before its first step."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from jointfuse.data.mixture import AnyCorpus, MixedSplit
from jointfuse.data.shards import AGAIN, Split
from jointfuse.errors import UserError

Tar = tuple[Path, str]  # and its SHA-256 in corpus.json


def splits_of(corpus: AnyCorpus, names: Iterable[str]) -> list[Split]:
    """Of every corpus of a mixture, each with its index opened. Raises UserError."""
    splits: list[Split] = []
    for name in names:
        split = corpus.split(name)
        splits += split.splits if isinstance(split, MixedSplit) else [split]
    for one in splits:
        one.open_index()
    return splits


def tars_of(splits: Iterable[Split]) -> list[Tar]:
    """Those that lie in a corpus; what comes through a cache is compared as it is fetched."""
    return [
        (path, shard["sha256"])
        for split in splits
        if not split.cache
        for path, shard in zip(split.shards, split.info["shards"], strict=True)
    ]


def changed_tar(tars: Sequence[Tar], advance: Callable[[], None]) -> str | None:
    """What is wrong with the first tar that is not as it was built; None where none is. Reads all of them."""
    for path, wanted in tars:
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            return f"{path}: {error.strerror}; {AGAIN}"
        if found != wanted:
            return (
                f"{path}: changed since the corpus was built (SHA-256 {found[:12]}…, corpus.json says {wanted[:12]}…); "
                f"`tools/verify_shards.py {path.parents[1]}` names the samples; {AGAIN}"
            )
        advance()
    return None


def check_entries(splits: Iterable[Split]) -> None:
    """Every entry of every index. Raises UserError."""
    for split in splits:
        split.check_index()


def first_fault(faults: Iterable[str | None]) -> None:
    """Raises UserError with the first of what several processes found; the same on each of them."""
    found = [fault for fault in faults if fault]
    if found:
        raise UserError(found[0])
