"""What the ranks of a training look at together before they begin."""

import os
from collections.abc import Iterable

import torch.distributed as dist

from jointfuse.data.intact import Tar, check_entries, check_tars, splits_of, tars_of
from jointfuse.data.mixture import AnyCorpus
from jointfuse.data.parallel import progress
from jointfuse.errors import ReadableError


def check_data(corpus: AnyCorpus, names: Iterable[str], hashes: bool) -> None:
    """Open the index of every split that will be read, and compare every tar's hash if `hashes`.

    Every rank calls it. The ranks of a machine share its tars, since each machine may have a copy of its own.

    Raises:
        UserError, PassingFault: the same on every rank.
    """
    fault: ReadableError | None = None
    try:
        splits = splits_of(corpus, [name for name in names if name in corpus.splits])
        if hashes:
            check_entries(splits)
            _check_own(tars_of(splits))
    except ReadableError as error:
        fault = error
    faults: list[ReadableError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(faults, fault)
    if first := next(filter(None, faults), None):
        raise first


def _check_own(tars: list[Tar]) -> None:
    here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    rank, ranks = (int(os.environ["LOCAL_RANK"]), int(here)) if here else (dist.get_rank(), dist.get_world_size())
    own = tars[rank::ranks]
    if dist.get_rank():
        check_tars(own, lambda: None)
        return
    with progress("comparing hashes", len(own), 0) as advance:
        check_tars(own, advance)
