"""Similarities tile by tile, recomputed backward: memory O(K D), on any device.

s is symmetric, and so are the coefficients g_i p_ij + g_j p_ji: among a rank's own rows only the tiles on and above
the diagonal are computed, and each serves its rows and its columns. On one rank that is 4 K^2 D operations, forward
and backward, where the dense form takes 6 K^2 D; with many ranks it tends to 6 n K D.
"""

from collections.abc import Iterator

import torch

LEAST = -1e6  # of a logarithm whose probability is 0 in any precision: 0 times it is 0
TILE = {"cpu": 1024, "cuda": 4096}  # rows and columns of similarities held at once


def _tiles(pool: torch.Tensor, start: int, n: int, tau: torch.Tensor) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """(own rows i, columns j, similarities (|i|, |j|)), rows and columns counted in the pool.

    Of two tiles that are each other's transpose among the own rows, only the upper one comes.
    """
    size = TILE.get(pool.device.type, TILE["cuda"])
    end = start + n
    own = [slice(a, min(a + size, end)) for a in range(start, end, size)]
    before = [slice(a, min(a + size, start)) for a in range(0, start, size)]
    after = [slice(a, min(a + size, len(pool))) for a in range(end, len(pool), size)]
    for number, i in enumerate(own):
        anchors = _precise(pool[i]) / tau
        for j in before + own[number:] + after:
            s = anchors @ _precise(pool[j]).T
            if i == j:
                s.fill_diagonal_(-torch.inf)
            yield i, j, s


def _mirrored(i: slice, j: slice, start: int, n: int) -> bool:
    """Whether a tile also stands for its transpose: off the diagonal, its columns own rows too."""
    return i != j and start <= j.start < start + n


def log_sum_exp(pool: torch.Tensor, start: int, n: int, tau: torch.Tensor) -> torch.Tensor:
    lse = tau.new_full((n,), -torch.inf)
    for i, j, s in _tiles(pool, start, n, tau):
        row = _from(i, start)
        lse[row] = torch.logaddexp(lse[row], s.logsumexp(dim=1))
        if _mirrored(i, j, start, n):
            column = _from(j, start)
            lse[column] = torch.logaddexp(lse[column], s.logsumexp(dim=0))
    return lse


def pull(
    pool: torch.Tensor, start: int, n: int, tau: torch.Tensor, lse: torch.Tensor, g: torch.Tensor, with_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    pulled = tau.new_zeros(n, pool.shape[1])
    entropy = tau.new_zeros(n) if with_entropy else None
    for i, j, s in _tiles(pool, start, n, tau):
        row, column = _from(i, start), _from(j, start)
        mirrored = _mirrored(i, j, start, n)
        log_p, log_back = s - lse[i, None], s.sub_(lse[j])
        if entropy is None:
            p, p_back = log_p.exp_(), log_back.exp_()
        else:
            p, p_back = log_p.exp(), log_back.exp()
            entropy[row] -= torch.linalg.vecdot(p, log_p.clamp_min_(LEAST))
            if mirrored:
                entropy[column] -= torch.linalg.vecdot(p_back, log_back.clamp_min_(LEAST), dim=0)
        coefficients = p.mul_(g[i, None]).addcmul_(p_back, g[j])
        pulled[row].addmm_(coefficients, _precise(pool[j]))
        if mirrored:
            pulled[column].addmm_(coefficients.T, _precise(pool[i]))
    return pulled, None if entropy is None else torch.dot(g[start : start + n], entropy)


def _from(rows: slice, start: int) -> slice:
    return slice(rows.start - start, rows.stop - start)


def _precise(rows: torch.Tensor) -> torch.Tensor:
    return rows if rows.dtype == torch.float64 else rows.float()
