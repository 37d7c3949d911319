"""All similarities at once, (n, K): obvious, and the only backend that is not bounded in memory."""

import torch


def _similarities(pool: torch.Tensor, start: int, n: int, tau: torch.Tensor) -> torch.Tensor:
    """(n, K), each own row's similarity to itself at -inf."""
    s = pool[start : start + n] @ pool.T / tau
    s.diagonal(start).fill_(-torch.inf)
    return s


def log_sum_exp(pool: torch.Tensor, start: int, n: int, tau: torch.Tensor) -> torch.Tensor:
    return _similarities(_precise(pool), start, n, tau).logsumexp(dim=1)


def pull(
    pool: torch.Tensor, start: int, n: int, tau: torch.Tensor, lse: torch.Tensor, g: torch.Tensor, with_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    pool, own = _precise(pool), slice(start, start + n)
    s = _similarities(pool, start, n, tau)
    log_p = s - lse[own, None]
    p = log_p.exp()
    coefficients = g[own, None] * p + g * (s - lse).exp()
    entropy = -torch.linalg.vecdot(p, log_p.masked_fill(s.isneginf(), 0)) if with_entropy else None
    return coefficients @ pool, None if entropy is None else torch.dot(g[own], entropy)


def _precise(pool: torch.Tensor) -> torch.Tensor:
    return pool if pool.dtype == torch.float64 else pool.float()
