"""The kernels of the Triton backend: what one program does with one block of rows.

Shapes: a pool (K, D), of which a rank's own rows are start to own_end; tiles of BM rows, BN columns, BD of the width.
s is symmetric: a block of own rows meets the columns from its own first row on, and what of them lies further right
among the own rows is counted for those columns too. The columns before the own rows come last. So the columns of a
block that begins at row `first` are, in tiles, [first, K) and then [0, start).

`rows` and `columns` are the pool: two tensor descriptors of its tiles where TMA, the same pointer twice elsewhere.
"""

import triton
import triton.language as tl


@triton.jit
def _products(
    rows, columns, i_first, j_first, K, D: tl.constexpr,
    TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """pool_i . pool_j of a tile, (BM, BN) float32; what lies beyond the pool is any number."""
    total = tl.zeros((BM, BN), dtype=tl.float32)
    if TMA:
        for first in range(0, D, BD):
            a = rows.load([i_first, first])
            b = columns.load([j_first, first])
            total = tl.dot(a, b.T, total, input_precision="tf32x3")
    else:
        d = tl.arange(0, BD)
        i = tl.minimum(i_first + tl.arange(0, BM), K - 1).to(tl.int64)
        j = tl.minimum(j_first + tl.arange(0, BN), K - 1).to(tl.int64)
        a_at = rows + i[:, None] * D + d[None, :]
        b_at = columns + j[None, :] * D + d[:, None]
        for first in range(0, D, BD):
            if D % BD == 0:
                a, b = tl.load(a_at + first), tl.load(b_at + first)
            else:
                inside = first + d < D
                a = tl.load(a_at + first, mask=inside[None, :], other=0.0)
                b = tl.load(b_at + first, mask=inside[:, None], other=0.0)
            total = tl.dot(a, b, total, input_precision="tf32x3")
    return total


@triton.jit
def _column_tile(tile, first, start, K, BN: tl.constexpr):
    """First column of a tile, and the end of the columns it belongs to."""
    onward = tl.cdiv(K - first, BN)
    if tile < onward:
        j_first, j_end = first + tile * BN, K
    else:
        j_first, j_end = (tile - onward) * BN, start
    return j_first, j_end


@triton.jit
def _halves(tile, BM: tl.constexpr, BN: tl.constexpr):
    """The left and the right half of a tile."""
    return tl.split(tl.permute(tl.reshape(tile, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def _seen(s, scale, largest, total):
    """Largest product of each row, and the sum of the powers of two relative to it, with those of a tile."""
    larger = tl.maximum(largest, tl.max(s, axis=1))
    shift = tl.where(larger == float("-inf"), 0.0, larger) * scale
    total = total * tl.exp2(largest * scale - shift) + tl.sum(tl.exp2(s * scale - shift[:, None]), axis=1)
    return larger, total


@triton.jit
def _seen_by_columns(s, scale, to, j, inside):
    """Stores each column's log-sum-exp over the rows of a tile; no column is empty."""
    shift = tl.max(s, axis=0) * scale
    total = tl.sum(tl.exp2(s * scale - shift[None, :]), axis=0)
    tl.store(to + j, (shift + tl.log2(total)) * 0.6931471805599453, mask=inside)


@triton.jit
def _masked(s, i, j, j_end):
    return tl.where((j < j_end)[None, :] & (i[:, None] != j[None, :]), s, float("-inf"))


@triton.jit
def log_sum_exp_kernel(
    rows, columns, parts, mirrored, tau, first_row, last_row, start, own_end, K,
    D: tl.constexpr, TMA: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Log-sum-exps of own rows first_row to last_row.

    parts[part, row]: of the columns in one part of a block's tiles. mirrored[block, column]: of own columns right of a
    block, over its rows; the other entries stay as they are.
    """
    part, block = tl.program_id(0), tl.program_id(1)
    i_first = first_row + block * BM
    i = i_first + tl.arange(0, BM)
    scale = 1.4426950408889634 / tl.load(tau)
    largest = tl.full((BM,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BM,), dtype=tl.float32)
    tiles = tl.cdiv(K - i_first, BN) + tl.cdiv(start, BN)
    a_part = tl.cdiv(tiles, tl.num_programs(0))
    end = tl.minimum((part + 1) * a_part, tiles)
    to = mirrored + block.to(tl.int64) * (own_end - start) - start
    tile = part * a_part
    while tile < end:  # the interpreter, under numpy 2.4, takes no range with a bound read at run time
        j_first, j_end = _column_tile(tile, i_first, start, K, BN)
        s = _products(rows, columns, i_first, j_first, K, D, TMA, BM, BN, BD)
        bare = (j_first + BN <= j_end) & ((j_first >= i_first + BM) | (j_first < start))
        beside = (j_first + BN > i_first + BM) & (j_first < own_end)
        if SPLIT > 1:
            left, right = _halves(s, BM, BN)
            j = j_first + tl.arange(0, BN // 2)
            if not bare:
                left, right = _masked(left, i, j, j_end), _masked(right, i, j + BN // 2, j_end)
            largest, total = _seen(left, scale, largest, total)
            if beside:
                _seen_by_columns(left, scale, to, j, (j >= i_first + BM) & (j < own_end))
            largest, total = _seen(right, scale, largest, total)
            if beside:
                j += BN // 2
                _seen_by_columns(right, scale, to, j, (j >= i_first + BM) & (j < own_end))
        else:
            j = j_first + tl.arange(0, BN)
            if not bare:
                s = _masked(s, i, j, j_end)
            largest, total = _seen(s, scale, largest, total)
            if beside:
                _seen_by_columns(s, scale, to, j, (j >= i_first + BM) & (j < own_end))
        tile += 1
    lse = (largest * scale + tl.log2(tl.where(total > 0, total, 1.0))) * 0.6931471805599453
    row = block * BM + tl.arange(0, BM)
    tl.store(parts + part.to(tl.int64) * (last_row - first_row) + row, lse, mask=i < last_row)


@triton.jit
def _write(
    s, scale, i, j, j_end, last_row, own_end, lse_i, g_i, x_i, lse, g, K, middle, to,
    PLAIN: tl.constexpr, WITH_ENTROPY: tl.constexpr,
):  # fmt: skip
    """Stores c_ij = g_i p_ij + g_j p_ji of a part of a tile; its share in -sum g_i p_ij log2 p_ij by rows, (BM,).

    L are log-sum-exps in powers of two. Where PLAIN no pair is left out, and those of the tile lie close together: one
    exponential serves both, p_ji = p_ij 2^(L_i - middle) 2^(middle - L_j), with factors between 2^(-CLOSE / 2) and
    2^(CLOSE / 2). Nothing overflows, and what of p_ji is lost where p_ij underflows is below 2^(CLOSE - 126).
    """
    if PLAIN:
        lse_j, g_j = tl.load(lse + j), tl.load(g + j)
    else:
        lse_j, g_j = tl.load(lse + j, mask=j < K, other=0.0), tl.load(g + j, mask=j < K, other=0.0)
    lse_j = tl.minimum(lse_j * 1.4426950408889634, 1e38)  # a queue's key has an infinite one, and g_j = 0
    # In the panels of own columns right of this one, these rows are no columns: their columns' entropies count here.
    counted = tl.where((j >= last_row) & (j < own_end), 1.0, 0.0)
    kind = to.dtype.element_ty
    share = g_i
    if PLAIN:
        log_p = s * scale - lse_i[:, None]
        p = tl.exp2(log_p)
        factor = g_j * tl.exp2(middle - lse_j)
        tl.store(to, (p * (x_i[:, None] * factor[None, :] + g_i[:, None])).to(kind))
        if WITH_ENTROPY:
            factor = factor * counted
            log_back = s * scale - lse_j[None, :]
            share = -tl.sum(p * (g_i[:, None] * log_p + x_i[:, None] * (factor[None, :] * log_back)), axis=1)
    else:
        s = _masked(s, i, j, j_end) * scale
        s = tl.where((i < last_row)[:, None], s, float("-inf"))
        forth, back = g_i[:, None] * tl.exp2(s - lse_i[:, None]), g_j[None, :] * tl.exp2(s - lse_j[None, :])
        tl.store(to, (forth + back).to(kind))
        if WITH_ENTROPY:
            s = tl.maximum(s, -1e38)  # 0 times it is 0
            share = -tl.sum(forth * (s - lse_i[:, None]) + back * (counted[None, :] * (s - lse_j[None, :])), axis=1)
    return share


@triton.jit
def _write_tile(
    s, scale, i, j_first, j_end, last_row, own_end, lse_i, g_i, lse, g, K, middle, to,
    PLAIN: tl.constexpr, WITH_ENTROPY: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A tile in SPLIT parts beside each other, for which fewer registers do."""
    WIDTH: tl.constexpr = BN // SPLIT
    x_i = tl.exp2(lse_i - middle)
    j = j_first + tl.arange(0, WIDTH)
    to += tl.arange(0, WIDTH)[None, :]
    if SPLIT == 1:
        share = _write(
            s, scale, i, j, j_end, last_row, own_end, lse_i, g_i, x_i, lse, g, K, middle, to, PLAIN, WITH_ENTROPY
        )
    else:
        left, right = _halves(s, BM, BN)
        if SPLIT == 2:
            share = _write(
                left, scale, i, j, j_end, last_row, own_end, lse_i, g_i, x_i, lse, g, K, middle, to, PLAIN, WITH_ENTROPY
            )
            share += _write(
                right, scale, i, j + WIDTH, j_end, last_row, own_end, lse_i, g_i, x_i, lse, g, K, middle, to + WIDTH,
                PLAIN, WITH_ENTROPY,
            )  # fmt: skip
        else:
            one, two = _halves(left, BM, BN // 2)
            three, four = _halves(right, BM, BN // 2)
            share = _write(
                one, scale, i, j, j_end, last_row, own_end, lse_i, g_i, x_i, lse, g, K, middle, to, PLAIN, WITH_ENTROPY
            )
            share += _write(
                two, scale, i, j + WIDTH, j_end, last_row, own_end, lse_i, g_i, x_i, lse, g, K, middle, to + WIDTH,
                PLAIN, WITH_ENTROPY,
            )  # fmt: skip
            share += _write(
                three, scale, i, j + 2 * WIDTH, j_end, last_row, own_end, lse_i, g_i, x_i, lse, g, K, middle,
                to + 2 * WIDTH, PLAIN, WITH_ENTROPY,
            )  # fmt: skip
            share += _write(
                four, scale, i, j + 3 * WIDTH, j_end, last_row, own_end, lse_i, g_i, x_i, lse, g, K, middle,
                to + 3 * WIDTH, PLAIN, WITH_ENTROPY,
            )  # fmt: skip
    return share


@triton.jit
def coefficient_kernel(
    rows, columns, coefficients, entropies, tau, lse, g, first_row, last_row, start, own_end, K, stride, onward_columns,
    D: tl.constexpr, WITH_ENTROPY: tl.constexpr, CLOSE: tl.constexpr,
    TMA: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A panel of coefficients: its rows are own rows first_row to last_row, its columns [first_row, K) from 0 on and
    [0, start) from onward_columns on. It has room for whole tiles.

    entropies[program]: a tile's part of the sum of g_i times the entropy of p_i.
    """
    # Neighbours in time share columns: a group of row blocks goes over the columns together.
    GROUP: tl.constexpr = 8
    tiles = tl.cdiv(K - first_row, BN) + tl.cdiv(start, BN)
    row_blocks, program = tl.cdiv(last_row - first_row, BM), tl.program_id(0)
    group = program // (GROUP * tiles) * GROUP
    height = tl.minimum(row_blocks - group, GROUP)
    row_block = group + program % (GROUP * tiles) % height
    tile = program % (GROUP * tiles) // height
    i_first = first_row + row_block * BM
    i = i_first + tl.arange(0, BM)
    j_first, j_end = _column_tile(tile, first_row, start, K, BN)
    s = _products(rows, columns, i_first, j_first, K, D, TMA, BM, BN, BD)

    scale = 1.4426950408889634 / tl.load(tau)
    inside = i < last_row
    lse_i = tl.load(lse + i, mask=inside, other=0.0) * 1.4426950408889634
    g_i = tl.load(g + i, mask=inside, other=0.0)
    j = j_first + tl.arange(0, BN)
    lse_j = tl.load(lse + j, mask=j < K, other=0.0) * 1.4426950408889634
    low = tl.minimum(tl.min(lse_i), tl.min(lse_j))
    high = tl.maximum(tl.max(lse_i), tl.max(tl.where(lse_j == float("inf"), float("-inf"), lse_j)))
    middle = 0.5 * (low + high)
    whole = (i_first + BM <= last_row) & (j_first + BN <= j_end)
    plain = whole & ((j_first >= i_first + BM) | (j_first + BN <= i_first)) & (high - low <= CLOSE)
    row = (row_block * BM + tl.arange(0, BM)).to(tl.int64)
    to = (
        coefficients + row[:, None] * stride + tl.where(j_first >= start, j_first - first_row, onward_columns + j_first)
    )
    if plain:
        share = _write_tile(
            s, scale, i, j_first, j_end, last_row, own_end, lse_i, g_i, lse, g, K, middle, to,
            True, WITH_ENTROPY, SPLIT, BM, BN,
        )  # fmt: skip
        if WITH_ENTROPY:
            tl.store(entropies + program, tl.sum(share) * 0.6931471805599453)
    else:
        share = _write_tile(
            s, scale, i, j_first, j_end, last_row, own_end, lse_i, g_i, lse, g, K, middle, to,
            False, WITH_ENTROPY, SPLIT, BM, BN,
        )  # fmt: skip
        if WITH_ENTROPY:
            tl.store(entropies + program, tl.sum(share) * 0.6931471805599453)
