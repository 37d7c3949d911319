"""Tile sizes of the kernels: which there are for a GPU and a precision, and which of them is fastest."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
import triton

from jointfuse.losses.backends.kernels import log_sum_exp_kernel

log = logging.getLogger("jointfuse")
T = TypeVar("T")
_fastest: dict[tuple[Any, ...], "Tile"] = {}


@dataclass(frozen=True)
class Tile:
    """BM rows by BN columns of similarities, BD of the width at a time."""

    BM: int
    BN: int
    BD: int
    warps: int
    stages: int  # tiles of the pool that are on their way at once
    split: int = 1  # parts of a tile that are worked on one after the other, for which fewer registers do
    tma: bool = False  # tiles of the pool come through tensor descriptors

    def arguments(self) -> dict[str, Any]:
        """What a kernel is compiled with."""
        sizes = {"BM": self.BM, "BN": self.BN, "BD": self.BD, "SPLIT": self.split, "TMA": self.tma}
        return sizes | {"num_warps": self.warps, "num_stages": self.stages}


INTERPRETED = not isinstance(log_sum_exp_kernel, triton.runtime.JITFunction)
FOR_THE_INTERPRETER = [Tile(16, 32, 16, 4, 1)]


KERNELS = ("log_sum_exp", "coefficients", "coefficients_entropy")
# BM, BN, BD, warps, stages, and the parts in which each kernel works on a tile (0: registers would be spilled), by the
# bytes of a number and whether the GPU has tensor descriptors. The first takes the least shared memory.
_SHAPES = {
    (2, True): [
        (128, 128, 64, 8, 3, (1, 2, 2)),
        (128, 256, 64, 8, 3, (2, 4, 0)),
        (128, 256, 64, 8, 4, (2, 4, 0)),
        (128, 128, 64, 4, 3, (2, 4, 0)),
        (64, 128, 64, 4, 4, (1, 2, 2)),
    ],
    (2, False): [
        (64, 128, 64, 4, 3, (1, 2, 2)),
        (128, 128, 32, 8, 4, (1, 2, 2)),
        (128, 128, 64, 8, 3, (1, 2, 2)),
        (128, 256, 32, 8, 3, (2, 4, 0)),
    ],
    (4, True): [
        (64, 64, 32, 4, 3, (1, 1, 2)),
        (128, 64, 32, 8, 3, (1, 1, 2)),
        (64, 128, 32, 8, 3, (1, 1, 2)),
        (128, 128, 32, 8, 3, (2, 2, 2)),
    ],
    (4, False): [
        (64, 64, 16, 4, 3, (1, 1, 2)),
        (128, 64, 16, 8, 3, (1, 1, 2)),
        (64, 64, 32, 8, 3, (1, 1, 2)),
    ],
}


def tiles(kernel: str, itemsize: int, capability: int) -> list[Tile]:
    """Those of a kernel for numbers of `itemsize` bytes on a GPU of a compute capability (80, 90, ...). None spills
    registers (tests/test_kernels_compile.py); the first is what torch.use_deterministic_algorithms takes."""
    tma, number = capability >= 90, KERNELS.index(kernel)
    shapes = _SHAPES[itemsize, tma]
    return [Tile(m, n, d, w, s, parts[number], tma) for m, n, d, w, s, parts in shapes if parts[number]]


def launch(kernel: str, pool: torch.Tensor, rows: int, run: Callable[[Tile], T]) -> T:
    """run(tile) with the fastest tile for this precision and width, and for so many rows and keys to the next power of
    two; it is tried once on the first such input."""
    if INTERPRETED:
        return run(FOR_THE_INTERPRETER[0])
    candidates = tiles(kernel, pool.element_size(), _capability())
    if torch.are_deterministic_algorithms_enabled():
        return run(candidates[0])
    key = (kernel, pool.dtype, pool.shape[1], rows.bit_length(), len(pool).bit_length(), torch.cuda.current_device())
    if key not in _fastest:
        _fastest[key] = _try(kernel, candidates, run)
    return run(_fastest[key])


def _try(kernel: str, candidates: list[Tile], run: Callable[[Tile], Any]) -> Tile:
    times = {tile: _milliseconds(kernel, tile, run) for tile in candidates}
    best = min(candidates, key=times.__getitem__)
    if times[best] == math.inf:
        raise RuntimeError(f"contrastive loss: no tile of kernel {kernel} runs here; loss.backend: tiled does")
    return best


def _milliseconds(kernel: str, tile: Tile, run: Callable[[Tile], Any]) -> float:
    try:
        return triton.testing.do_bench(lambda: run(tile), warmup=5, rep=20)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, triton.TritonError) as error:
        # What a compiler cannot do with one tile it can with another; the first line says what it was.
        log.info("contrastive loss: kernel %s, %s: %s", kernel, tile, str(error).strip().splitlines()[:1])
        return math.inf


@cache
def _capability() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


@cache
def processors() -> int:
    """Multiprocessors of the GPU."""
    return 132 if INTERPRETED else torch.cuda.get_device_properties(0).multi_processor_count
