"""Streams, events and memory of a GPU that is not there: what is computed on a CPU, and in which order a GPU may do it.

A GPU keeps the order of operations within a stream, and between streams where an event is waited for; nothing else.
Whatever order it is free to choose counts as chosen badly here.
"""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

Clock = Counter[int]  # of each stream, by its id: operations that have happened before
DEVICE = torch.device("cuda", 0)


@dataclass
class Block:
    """A piece of memory that the allocator hands out again."""

    stream: "Stream"
    writer: tuple[int, int] | None = None  # stream and number of the operation that wrote it
    readers: list[tuple[int, int]] = field(default_factory=list)
    recorded: bool = False  # its use in another stream; it stays out of use until the host has waited for that stream


class Memory:
    """What tensors of one storage hold; the block is free once none of them is left."""

    def __init__(self, gpu: "Gpu", block: Block) -> None:
        self.gpu, self.block = gpu, block

    def __del__(self) -> None:
        if not self.block.recorded:
            self.gpu.free.append(self.block)


class Stream:
    def __init__(self, gpu: "Gpu") -> None:
        self.gpu, self.clock = gpu, Clock()

    def wait_event(self, event: "Event") -> None:
        self.clock |= event.clock

    def wait_stream(self, other: "Stream") -> None:
        self.clock |= other.clock

    def advance(self) -> tuple[int, int]:
        self.clock[id(self)] += 1
        return id(self), self.clock[id(self)]

    def comes_after(self, operation: tuple[int, int] | None) -> bool:
        return operation is None or self.clock[operation[0]] >= operation[1]


class Event:
    def __init__(self) -> None:
        self.clock = Clock()  # an event that was never recorded keeps nobody waiting

    def record(self, stream: Stream) -> None:
        self.clock = stream.clock.copy()


class Gpu:
    """Takes the place of torch.cuda's streams."""

    def __init__(self) -> None:
        self.streams: list[Stream] = []  # beside the default one
        self.default = Stream(self)
        self.free: list[Block] = []
        self.reused = 0
        self.faults: list[str] = []
        self.thread = threading.local()
        self.lock = threading.RLock()

    def install(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(torch.cuda, "Stream", self.new_stream)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "stream", self.within)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        patch.setattr(torch.cuda, "set_device", lambda device: None)

    def new_stream(self, device: torch.device) -> Stream:
        self.streams.append(Stream(self))
        return self.streams[-1]

    @property
    def current(self) -> Stream:
        return getattr(self.thread, "stream", self.default)

    @contextmanager
    def within(self, stream: Stream) -> Iterator[None]:
        before, self.thread.stream = self.current, stream
        yield
        self.thread.stream = before

    def allocate(self) -> Memory:
        stream = self.current
        for block in self.free:
            if block.stream is stream:
                self.free.remove(block)
                self.reused += 1
                return Memory(self, block)
        return Memory(self, Block(stream))

    def run(self, reads: list[Block], writes: list[Block], what: str) -> None:
        """One operation in the current stream."""
        stream = self.current
        for block in reads:
            if not stream.comes_after(block.writer):
                self.faults.append(f"{what} reads what may not have been written yet")
        for block in writes:
            if not all(map(stream.comes_after, block.readers)):
                self.faults.append(f"{what} overwrites what may not have been read yet")
        operation = stream.advance()
        for block in reads:
            block.readers.append(operation)
        for block in writes:
            block.writer, block.readers = operation, []


class OnHost(torch.Tensor):
    """Pinned memory: what goes to the GPU from here is computed on the simulated one from then on."""

    gpu: Gpu

    @classmethod
    def of(cls, tensor: torch.Tensor, gpu: Gpu) -> Self:
        pinned = tensor.as_subclass(cls)
        pinned.gpu = gpu
        return pinned

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not torch.Tensor.to:
            return super().__torch_function__(function, types, args, kwargs)
        assert args[1] == DEVICE
        assert kwargs == {"non_blocking": True}
        with torch._C.DisableTorchFunctionSubclass():
            copy = args[0].as_subclass(torch.Tensor).clone()
        return OnGpu.made(args[0].gpu, copy, {}, "a copy to the GPU")


class OnGpu(torch.Tensor):
    memory: Memory

    def record_stream(self, stream: Any) -> None:
        self.memory.block.recorded |= stream is not self.memory.block.stream

    @classmethod
    def made(cls, gpu: Gpu, result: torch.Tensor, given: dict[int, Memory], what: str) -> Self:
        """A result of an operation on `given`, by the address of each one's storage."""
        with torch._C.DisableTorchFunctionSubclass():
            tensor = result.as_subclass(cls)
            view_of = given.get(result.untyped_storage().data_ptr())
        with gpu.lock:
            tensor.memory = view_of or gpu.allocate()
            gpu.run([memory.block for memory in given.values()], [] if view_of else [tensor.memory.block], what)
        return tensor

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, OnGpu)]
        gpu = tensors[0].memory.gpu
        with torch._C.DisableTorchFunctionSubclass():
            given = {tensor.untyped_storage().data_ptr(): tensor.memory for tensor in tensors}
            result = function(*args, **(kwargs or {}))
        return tree_map(
            lambda leaf: cls.made(gpu, leaf, given, function.__name__) if isinstance(leaf, torch.Tensor) else leaf,
            result,
        )
