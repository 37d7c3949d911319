"""Fused kernels: the log-sum-exp never writes a similarity, the backward pass writes panels of coefficients.

A 128 x 1536 float32 accumulator does not fit a multiprocessor, so the backward pass is not one kernel: coefficients
c_ij = g_i p_ij + g_j p_ji of a panel of rows are written once, in the pool's precision, and multiplied by the pool with
the vendor's matrix product. s and c are symmetric: among a rank's own rows a pair is computed once, and a panel also
serves, transposed, the rows after it. On one rank that is 4 K^2 D operations, forward and backward, where the dense
form takes 6 K^2 D. Memory is O(K D) and one panel. Nothing is added atomically: the same input gives the same bits
wherever the tile sizes are the same, and those are fixed under torch.use_deterministic_algorithms.
"""

from typing import Any

import torch
import triton
from torch.nn.functional import pad
from triton.tools.tensor_descriptor import TensorDescriptor

from jointfuse.losses.backends.kernels import coefficient_kernel, log_sum_exp_kernel
from jointfuse.losses.backends.panels import Panel, panels
from jointfuse.losses.backends.tiles import INTERPRETED, Tile, launch, processors
from jointfuse.losses.parts import add_product

BAND_BYTES = 64 * 2**20  # of log-sum-exps of columns held at once,
LEAST_BAND = 64  # ... but those of at least so many blocks of rows
PARTS = 8  # of a row block's columns, at least: the row blocks at work stay in the second-level cache
PROGRAMS = 1056  # wanted: eight for each multiprocessor of a large GPU
HALF_RANGE = 2.0**14  # float16 coefficients of at most twice this do not overflow
CLOSE = 64.0  # log-sum-exps, in powers of two, at most so far apart: one exponential serves two probabilities


def check(device: torch.device, dtype: torch.dtype) -> None:
    """Raises ValueError where the kernels cannot run."""
    if dtype == torch.float64:
        raise ValueError("backend 'triton' accumulates in float32; 'tiled' and 'reference' take float64")
    if dtype == torch.bfloat16 and INTERPRETED:
        raise ValueError("backend 'triton': Triton's interpreter does not multiply bfloat16")
    if device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"backend 'triton' needs a GPU, the features are on {device.type}; 'tiled' works there")


def log_sum_exp(pool: torch.Tensor, start: int, n: int, tau: torch.Tensor) -> torch.Tensor:
    if not n:
        return tau.new_empty(0)
    pool, keys, end = _aligned(pool), len(pool), start + n

    def run(tile: Tile) -> torch.Tensor:
        lse, band = tau.new_full((n,), -torch.inf), max(LEAST_BAND, BAND_BYTES // (4 * n)) * tile.BM
        for first in range(start, end, band):
            last = min(first + band, end)
            blocks = triton.cdiv(last - first, tile.BM)
            columns = triton.cdiv(keys - first, tile.BN) + triton.cdiv(start, tile.BN)
            parts = min(columns, max(PARTS, PROGRAMS // blocks))
            direct, mirrored = tau.new_empty(parts, last - first), tau.new_full((blocks + 1, n), -torch.inf)
            log_sum_exp_kernel[parts, blocks](
                *_operands(pool, tile), direct, mirrored, tau, first, last, start, end, keys,
                D=pool.shape[1], **tile.arguments(),
            )  # fmt: skip
            mirrored[blocks] = lse  # of earlier bands
            lse = mirrored.logsumexp(dim=0)
            own = lse[first - start : last - start]
            own.copy_(torch.logaddexp(own, direct.logsumexp(dim=0)))
        return lse

    return launch("log_sum_exp", pool, n, run)


def pull(
    pool: torch.Tensor, start: int, n: int, tau: torch.Tensor, lse: torch.Tensor, g: torch.Tensor, with_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    width = pool.shape[1]
    pool, keys, end = _aligned(pool), len(pool), start + n
    pulled = tau.new_zeros(n, pool.shape[1])
    entropy = tau.new_zeros(()) if with_entropy else None
    if not n:
        return pulled[:, :width], entropy
    # g is 1 / counted anchors: float16 would lose it.
    raised = HALF_RANGE / g.max().clamp_min(1e-30) if pool.dtype == torch.float16 else tau.new_ones(())
    g = g * raised
    every = panels(start, n, keys, pool.shape[1], pool.element_size(), processors())
    room = pool.new_empty(max(panel.numbers for panel in every))
    for panel in every:

        def run(tile: Tile, panel: Panel = panel) -> torch.Tensor:
            programs = triton.cdiv(panel.last - panel.first, tile.BM) * panel.tiles(tile.BN)
            entropies = tau.new_empty(programs if with_entropy else 0)
            coefficient_kernel[(programs,)](
                *_operands(pool, tile), room, entropies, tau, lse, g, panel.first, panel.last, start, end, keys,
                panel.stride, panel.onward, D=pool.shape[1], WITH_ENTROPY=with_entropy, CLOSE=CLOSE,
                **tile.arguments(),
            )  # fmt: skip
            return entropies.sum()

        kernel = "coefficients_entropy" if with_entropy else "coefficients"
        found = launch(kernel, pool, panel.last - panel.first, run)
        if entropy is not None:
            entropy += found
        _spread(room, panel, pool, pulled, end)
    if entropy is not None:
        entropy /= raised
    return pulled.div_(raised)[:, :width], entropy


def _spread(room: torch.Tensor, panel: Panel, pool: torch.Tensor, pulled: torch.Tensor, end: int) -> None:
    """Adds a panel's coefficients times the pool to the own rows, those of the panel and those after it."""
    first, last, start, rows = panel.first, panel.last, panel.start, panel.last - panel.first
    coefficients = room[: rows * panel.stride].view(rows, panel.stride)
    own = pulled[first - start : last - start]
    add_product(own, coefficients[:, : panel.keys - first], pool[first:])
    if start:
        add_product(own, coefficients[:, panel.onward : panel.onward + start], pool[:start])
    if last < end:
        add_product(pulled[last - start :], coefficients[:, rows : end - first].T, pool[first:last])


def _aligned(pool: torch.Tensor) -> torch.Tensor:
    """The pool with rows that begin at multiples of 16 bytes, zeros at their ends: what copies by the tile take."""
    missing = -pool.shape[1] % (16 // pool.element_size())
    if missing:
        return pad(pool, (0, missing))
    return pool if pool.data_ptr() % 16 == 0 else pool.clone()


def _operands(pool: torch.Tensor, tile: Tile) -> tuple[Any, Any]:
    """The pool as the kernels take it, for rows and for columns."""
    if not tile.tma:
        return pool, pool
    return tuple(TensorDescriptor.from_tensor(pool, [height, tile.BD]) for height in (tile.BM, tile.BN))
