"""The machine a benchmark runs on: its name, its matmul rate, peak memory of a piece of work, bytes its ranks send."""

import ctypes
import gc
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return f"{line.split(':', 1)[1].strip()}, {torch.get_num_threads()} threads"
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def seconds(work: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call, the device's work included."""
    _wait()
    started = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - started


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matmul_rate(dtype: torch.dtype) -> float:
    """Operations a second of the largest square product that takes well below a second; the best of several."""
    side = 8192 if torch.cuda.is_available() else 2048
    a, b = (torch.randn(side, side, device=device()).to(dtype) for _ in range(2))
    a @ b
    return max(2 * side**3 / seconds(lambda: a @ b) for _ in range(5))


def peak_bytes(work: Callable[[], Any]) -> int | None:
    """Most memory held during `work` above what was held before; None where the system does not tell."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        _give_back_freed_blocks()
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
        before = status("VmRSS")
        work()
        return max(0, status("VmHWM") - before)
    except OSError:
        return None


def held_bytes(work: Callable[[], Any]) -> int | None:
    """Memory held by what `work` returns, an autograd graph with all it keeps; None where the system does not tell."""
    gc.collect()
    try:
        before = _held()
        result = work()
        held = _held() - before
    except OSError:
        return None
    del result
    return max(0, held)


def mebibytes(number: int | None) -> str:
    return "not told here" if number is None else f"{number / 2**20:,.0f}"


def _held() -> int:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    _give_back_freed_blocks()
    return status("VmRSS")


def _give_back_freed_blocks() -> None:
    """From here on freed blocks go back to the system at once."""
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
    libc.malloc_trim(0)


def status(key: str) -> int:
    """Bytes that /proc/self/status has under a key, such as VmRSS. Raises OSError where there is none."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(key)


class Collectives(TorchDispatchMode):
    """The collectives started inside, each with the bytes that this rank gives to it, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            name = function.__name__.split(".")[0].strip("_")
            # Gathers and scatters take (outputs, inputs, ...), reductions work in place.
            tensors = args[1] if any(kind in name for kind in ("gather", "scatter", "alltoall")) else args[0]
            self.given.append((name, _bytes(tensors)))
        return function(*args, **(kwargs or {}))

    def sent(self) -> int:
        """Bytes that leave this rank, as rings send them."""
        others, ranks = dist.get_world_size() - 1, dist.get_world_size()
        total = 0.0
        for name, size in self.given:
            if "allgather" in name:
                total += size * others
            elif "allreduce" in name:
                total += 2 * size * others / ranks
            else:  # reduce-scatter, all-to-all: a share for every other rank
                total += size * others / ranks
        return round(total)


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    if isinstance(tensors, list | tuple):
        return sum(_bytes(tensor) for tensor in tensors)
    return 0
