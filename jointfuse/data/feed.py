"""A rank's batches on the device that trains, made while the step before them is still at work there."""

import queue
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, TypeVar

import torch

from jointfuse.data.batch import Batch, HostBatch
from jointfuse.data.features import FrontEnd

AHEAD = 2  # batches ready on a GPU
T = TypeVar("T")


@dataclass
class Waited:
    """Time for which a step had to wait for its data."""

    seconds: float = 0.0


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream in which a device's batches are made: one for all epochs and evaluations, since memory that was used
    in one stream is kept for that stream."""
    return torch.cuda.Stream(device)


class Feed:
    """Host batches in, device batches out, in the same order.

    On a GPU a thread copies the next ones and makes their spectrograms in a stream of its own.

    Args:
        waited: what waiting is added to.
    """

    def __init__(
        self, batches: Iterable[HostBatch], device: torch.device, front_end: FrontEnd, waited: Waited | None = None
    ) -> None:
        self.batches, self.device, self.front_end = batches, device, front_end
        self.waited = waited or Waited()

    def __iter__(self) -> Iterator[Batch]:
        if self.device.type != "cuda":
            for host in self._timed(self.batches):
                yield host.to(self.device, self.front_end)
            return
        for batch, made in self._timed(ahead(self._copied(), AHEAD)):
            current = torch.cuda.current_stream(self.device)
            current.wait_event(made)
            for field in fields(batch):
                tensor = getattr(batch, field.name)
                if isinstance(tensor, torch.Tensor):
                    tensor.record_stream(current)  # its memory is not the copying stream's to reuse before
            yield batch

    def _copied(self) -> Iterator[tuple[Batch, torch.cuda.Event]]:
        torch.cuda.set_device(self.device)  # a thread begins with the first one
        side = side_stream(self.device)
        for host in self.batches:
            with torch.cuda.stream(side):
                batch = host.to(self.device, self.front_end)
                made = torch.cuda.Event()
                made.record(side)
            yield batch, made

    def _timed(self, items: Iterable[T]) -> Iterator[T]:
        iterator = iter(items)
        while True:
            started = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self.waited.seconds += time.perf_counter() - started
            yield item


def ahead(items: Iterable[T], depth: int) -> Iterator[T]:
    """The same items, up to `depth` of them made beforehand by a thread; what it raises is raised here in its place."""
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    abandoned = threading.Event()

    def hand_over(kind: str, value: Any) -> None:
        while not abandoned.is_set():
            try:
                ready.put((kind, value), timeout=0.1)
            except queue.Full:
                continue
            return

    def make() -> None:
        try:
            for item in items:
                hand_over("item", item)
                if abandoned.is_set():
                    return
        except BaseException as error:
            hand_over("error", error)
        else:
            hand_over("end", None)

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        abandoned.set()
        thread.join()
