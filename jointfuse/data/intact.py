"""Whether what a training is going to read is what was built, looked at before its first step."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from jointfuse.data.mixture import AnyCorpus, MixedSplit
from jointfuse.data.shards import AGAIN, Split
from jointfuse.errors import UserError
from jointfuse.patience import patiently

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


def check_tars(tars: Sequence[Tar], advance: Callable[[], None]) -> None:
    """Read all of them.

    Raises:
        UserError: one is not as it was built.
        PassingFault: its disk is away.
    """
    for path, wanted in tars:
        try:
            digest = patiently(partial(_sha256, path), str(path))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; {AGAIN}") from error
        if digest != wanted:
            raise UserError(
                f"{path}: changed since the corpus was built (SHA-256 {digest[:12]}…, corpus.json says "
                f"{wanted[:12]}…); `tools/verify_shards.py {path.parents[1]}` names the samples; {AGAIN}"
            )
        advance()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_entries(splits: Iterable[Split]) -> None:
    """Every entry of every index. Raises UserError."""
    for split in splits:
        split.check_index()
