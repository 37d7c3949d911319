"""Fused kernels: the log-sum-exp never writes a similarity, the backward pass writes panels of coefficients.

A 128 x 1536 float32 accumulator does not fit a multiprocessor, so the backward pass is not one kernel: coefficients
c_ij = g_i p_ij + g_j p_ji of a panel of rows are written once, in the pool's precision, and multiplied by the pool with
the vendor's matrix product. Memory is O(K D) and one panel. Nothing is added atomically: the same input gives the same
bits wherever the tile sizes are the same, and those are fixed under torch.use_deterministic_algorithms.
"""

from typing import Any

import torch
import triton
import triton.language as tl

PANEL_BYTES = 256 * 2**20  # of coefficients held at once
PROGRAMS = 264  # wanted at once: two for each multiprocessor of a large GPU
HALF_RANGE = 2.0**14  # float16 coefficients of at most twice this do not overflow


@triton.jit
def _products(pool, i, i_in, j, j_in, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    """pool_i . pool_j of a tile, (BM, BN) float32."""
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for first in range(0, D, BD):
        d = first + tl.arange(0, BD)
        a = tl.load(pool + i.to(tl.int64)[:, None] * D + d[None, :], mask=i_in[:, None] & (d < D)[None, :], other=0.0)
        b = tl.load(pool + j.to(tl.int64)[None, :] * D + d[:, None], mask=j_in[None, :] & (d < D)[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="tf32x3")
    return total


@triton.jit
def _log_sum_exp_kernel(
    pool,
    parts,
    tau,
    start,
    n,
    K,
    a_part,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """parts[part, row]: log-sum-exp of a row's similarities to the columns of one part."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    part = tl.program_id(1)
    scale = 1.4426950408889634 / tl.load(tau)  # in powers of two
    i = start + row
    largest = tl.full((BM,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BM,), dtype=tl.float32)
    end = tl.minimum((part + 1) * a_part, K)
    first = part * a_part
    while first < end:  # the interpreter, under numpy 2.4, takes no range with a bound read at run time
        j = first + tl.arange(0, BN)
        s = _products(pool, i, row < n, j, j < end, D, BM, BN, BD) * scale
        s = tl.where((j < end)[None, :] & (i[:, None] != j[None, :]), s, float("-inf"))
        larger = tl.maximum(largest, tl.max(s, axis=1))
        finite = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp2(largest - finite) + tl.sum(tl.exp2(s - finite[:, None]), axis=1)
        largest = larger
        first += BN
    lse = tl.where(total > 0, (largest + tl.log2(tl.where(total > 0, total, 1.0))) * 0.6931471805599453, float("-inf"))
    tl.store(parts + part.to(tl.int64) * n + row, lse, mask=row < n)


@triton.jit
def _coefficient_kernel(
    pool, coefficients, entropies, tau, lse, g, first_row, rows, K, columns,
    D: tl.constexpr, WITH_ENTROPY: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """c_ij of a panel of rows from first_row on, (rows, K); entropies[column block, row]: parts of p_i's entropy."""
    # Neighbours in time share columns: a group of row blocks goes over the columns together.
    GROUP: tl.constexpr = 8
    row_blocks, program = tl.cdiv(rows, BM), tl.program_id(0)
    group = program // (GROUP * columns) * GROUP
    height = tl.minimum(row_blocks - group, GROUP)
    row_block = group + program % (GROUP * columns) % height
    column = program % (GROUP * columns) // height
    row = row_block * BM + tl.arange(0, BM)
    i, j = first_row + row, column * BN + tl.arange(0, BN)
    i_in, j_in = row < rows, j < K
    s = _products(pool, i, i_in, j, j_in, D, BM, BN, BD) / tl.load(tau)
    apart = i_in[:, None] & j_in[None, :] & (i[:, None] != j[None, :])
    s = tl.where(apart, s, float("-inf"))
    log_p = s - tl.load(lse + i, mask=i_in, other=0.0)[:, None]
    p = tl.exp(log_p)
    p_back = tl.exp(s - tl.load(lse + j, mask=j_in, other=0.0)[None, :])
    c = tl.load(g + i, mask=i_in, other=0.0)[:, None] * p + tl.load(g + j, mask=j_in, other=0.0)[None, :] * p_back
    where = coefficients + row.to(tl.int64)[:, None] * K + j[None, :]
    tl.store(where, c.to(coefficients.dtype.element_ty), mask=i_in[:, None] & j_in[None, :])
    if WITH_ENTROPY:
        part = -tl.sum(p * tl.where(apart, log_p, 0.0), axis=1)
        tl.store(entropies + column.to(tl.int64) * rows + row, part, mask=i_in)


INTERPRETED = not isinstance(_products, triton.runtime.JITFunction)


def check(device: torch.device, dtype: torch.dtype) -> None:
    """Raises ValueError where the kernels cannot run."""
    if dtype == torch.float64:
        raise ValueError("backend 'triton' accumulates in float32; 'tiled' and 'reference' take float64")
    if dtype == torch.bfloat16 and INTERPRETED:
        raise ValueError("backend 'triton': Triton's interpreter does not multiply bfloat16")
    if device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"backend 'triton' needs a GPU, the features are on {device.type}; 'tiled' works there")


def _tile_sizes(dtype: torch.dtype) -> list[dict[str, int]]:
    """Candidates, the safest first."""
    if INTERPRETED:
        return [{"BM": 16, "BN": 32, "BD": 16}]
    deep = 64 if dtype.itemsize == 2 else 32
    shapes = [(128, 128, 8, 3), (128, 256, 8, 3), (256, 128, 8, 3), (128, 128, 4, 4), (64, 128, 4, 4)]
    return [{"BM": m, "BN": n, "BD": deep, "num_warps": w, "num_stages": s} for m, n, w, s in shapes]


_fastest: dict[tuple[Any, ...], dict[str, int]] = {}


def _launch(name: str, dtype: torch.dtype, width: int, run: Any) -> None:
    """run(sizes) with the fastest tile sizes for this width and precision, tried once on the first input."""
    sizes = _tile_sizes(dtype)
    if len(sizes) > 1 and not torch.are_deterministic_algorithms_enabled():
        key = (name, dtype, width, torch.cuda.get_device_name())
        if key not in _fastest:
            _fastest[key] = min(sizes, key=lambda choice: _milliseconds(run, choice))
        sizes = [_fastest[key]]
    run(sizes[0])


def _milliseconds(run: Any, sizes: dict[str, int]) -> float:
    try:
        return triton.testing.do_bench(lambda: run(sizes), warmup=5, rep=20)
    except triton.runtime.errors.OutOfResources:
        return float("inf")


def log_sum_exp(pool: torch.Tensor, start: int, n: int, tau: torch.Tensor) -> torch.Tensor:
    keys, width = pool.shape
    lse = tau.new_full((n,), -torch.inf)
    if not n:
        return lse

    def run(sizes: dict[str, int]) -> None:
        blocks = triton.cdiv(n, sizes["BM"])
        columns = triton.cdiv(keys, sizes["BN"])
        parts = min(columns, max(1, PROGRAMS // blocks))
        a_part = triton.cdiv(columns, parts) * sizes["BN"]
        parts = triton.cdiv(keys, a_part)
        partial = tau.new_empty(parts, n)
        _log_sum_exp_kernel[blocks, parts](pool, partial, tau, start, n, keys, a_part, D=width, **sizes)
        torch.logsumexp(partial, dim=0, out=lse)

    _launch("log_sum_exp", pool.dtype, width, run)
    return lse


def pull(
    pool: torch.Tensor, start: int, n: int, tau: torch.Tensor, lse: torch.Tensor, g: torch.Tensor, with_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    keys, width = pool.shape
    pulled = tau.new_empty(n, width)
    entropy = tau.new_empty(n) if with_entropy else None
    # g is 1 / counted anchors: float16 would lose it.
    raised = HALF_RANGE / g.max().clamp_min(1e-30) if pool.dtype == torch.float16 and keys else tau.new_ones(())
    g = g * raised
    height = max(1, PANEL_BYTES // max(1, keys * pool.element_size()))
    for first in range(0, n, height):
        rows = min(height, n - first)
        coefficients = pool.new_empty(rows, keys)
        parts: list[torch.Tensor] = []

        def run(
            sizes: dict[str, int], first: int = first, rows: int = rows, panel: Any = coefficients, parts: Any = parts
        ) -> None:
            columns = triton.cdiv(keys, sizes["BN"])
            parts[:] = [tau.new_empty(columns if with_entropy else 0, rows)]
            _coefficient_kernel[(triton.cdiv(rows, sizes["BM"]) * columns,)](
                pool, panel, parts[0], tau, lse, g, start + first, rows, keys, columns,
                D=width, WITH_ENTROPY=with_entropy, **sizes,
            )  # fmt: skip

        _launch("coefficients", pool.dtype, width, run)
        pulled[first : first + rows] = _multiply(coefficients, pool)
        if entropy is not None:
            entropy[first : first + rows] = parts[0].sum(dim=0)
    return pulled.div_(raised), entropy


def _multiply(coefficients: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
    """(R, K) (K, D) -> (R, D) float32, whatever the precision of the factors."""
    if pool.dtype == torch.float32:
        return coefficients @ pool
    if pool.is_cuda:
        return torch.mm(coefficients, pool, out_dtype=torch.float32)
    return coefficients.float() @ pool.float()
