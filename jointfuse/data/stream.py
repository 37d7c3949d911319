"""From a plan and a reader to batches, decoded in worker processes, in the plan's order."""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol, Self, TypeVar

from torch.utils.data import DataLoader, Dataset

from jointfuse.data.parallel import end_with_parent
from jointfuse.data.plan import Planned
from jointfuse.errors import ReadableError, UserError


class Pinnable(Protocol):
    """A batch in host memory."""

    def pin_memory(self) -> Self: ...


Read = TypeVar("Read", bound=Pinnable, covariant=True)


class Reader(Protocol[Read]):
    """Reads what is planned: utterances (reader.py) or dialogues (dialogues.py)."""

    def batch(self, planned: Planned) -> Read: ...


class _PlannedBatches(Dataset[Any]):
    def __init__(self, reader: Reader[Any]) -> None:
        self.reader = reader

    def __getitem__(self, planned: Planned) -> Any:
        # An exception raised in a worker arrives wrapped in its stack trace; a value arrives as it is.
        try:
            return self.reader.batch(planned)
        except (ReadableError, OSError) as error:
            return error


def _start_worker(number: int) -> None:
    # torch's own watch begins later, and of a parent that is gone by then it would never hear.
    end_with_parent()


def stream(reader: Reader[Read], planned: Iterable[Planned], workers: int, pin: bool = False) -> Iterator[Read]:
    """Batches in exactly the planned order, whatever the number of workers; a plan is asked no further than they are
    ahead.

    Raises:
        UserError: an utterance could not be read, or a decoding process was killed.
        PassingFault: a disk or a server was away.
    """
    if not workers:
        for one in planned:
            batch = reader.batch(one)
            yield batch.pin_memory() if pin else batch
        return
    loader: DataLoader[Any] = DataLoader(
        _PlannedBatches(reader),
        sampler=planned,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=4,
        worker_init_fn=_start_worker,
    )
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise UserError(
                f"a decoding process ended ({str(error).splitlines()[0]}), probably for want of memory; "
                "choose fewer data.workers or a smaller train.batch and go on with --resume"
            ) from error
        if isinstance(batch, ReadableError | OSError):
            raise batch
        yield batch
