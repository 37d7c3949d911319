"""The inter-class contrastive loss, equation (7) of arXiv 2405.17900, over the utterances of all ranks.

Shapes: n own rows, K rows of all ranks, D width, C classes. s_ij = z_i.z_j / tau, P(i) the other rows of i's class.

    l_i = logsumexp_{j != i} s_ij - mean_{p in P(i)} s_ip          rows with an empty P(i) are not counted
    L   = mean of l_i over the counted rows of all ranks

s is symmetric, so a rank's own gradient needs only what the forward pass gathered: every z_j and every log-sum-exp.
Similarities are computed in tiles and recomputed backward; memory stays O(K D).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.nn.functional import normalize as l2_normalize

from jointfuse.losses.gather import gather_rows, world_size

TILE = 1024  # columns of similarities held at once


class _InterClassContrast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: torch.Tensor,
        temperature: torch.Tensor,
        labels: torch.Tensor,
        group: dist.ProcessGroup | None,
        tile: int,
    ) -> torch.Tensor:
        """z (n, D) valid rows only, temperature (1,), labels (n,) -> a scalar, this rank's share of L."""
        ranks = world_size(group)
        rank = dist.get_rank(group) if ranks > 1 else 0
        gathered = gather_rows(z, group)
        pool = torch.cat(gathered)  # (K, D)
        pool_labels = torch.cat(gather_rows(labels, group))  # (K,)
        start = sum(len(part) for part in gathered[:rank])
        own = slice(start, start + len(z))

        counts = torch.bincount(pool_labels, minlength=1)  # (C,)
        sums = pool.new_zeros(len(counts), pool.shape[1]).index_add_(0, pool_labels, pool)  # (C, D)
        partners = counts[pool_labels] - 1  # (K,)
        counted = partners > 0
        g = counted.to(pool.dtype) / counted.sum().clamp_min(1)  # (K,)
        w = g / partners.clamp_min(1)  # (K,)
        weighted_sums = torch.zeros_like(sums).index_add_(0, pool_labels, w[:, None] * pool)  # (C, D)

        lse = pool.new_full((len(z),), -torch.inf)
        for columns, similarity in _tiles(z, pool, temperature, start, tile):
            lse = torch.logaddexp(lse, similarity.logsumexp(dim=1))
            del columns
        # A pool of one row has no log-sum-exp. Rows that are not counted keep theirs: backward, exp(s - lse) must be
        # finite before it is multiplied by their weight of 0.
        lse = lse.masked_fill(lse.isneginf(), 0)
        pool_lse = torch.cat(gather_rows(lse, group))  # (K,)

        positive = ((sums[labels] - z) * z).sum(dim=1) / temperature / partners[own].clamp_min(1)  # (n,)
        ctx.save_for_backward(z, temperature, pool, pool_labels, sums, weighted_sums, g, w, pool_lse, positive)
        ctx.own, ctx.ranks, ctx.tile = own, ranks, tile
        return ranks * (g[own] * (lse - positive)).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        z, temperature, pool, pool_labels, sums, weighted_sums, g, w, lse, positive = ctx.saved_tensors
        own = ctx.own
        labels = pool_labels[own]
        pull = torch.zeros_like(z)  # sum_j g_i p_ij z_j
        push = torch.zeros_like(z)  # sum_j g_j p_ji z_j
        for columns, similarity in _tiles(z, pool, temperature, own.start, ctx.tile):
            pull += (similarity - lse[own, None]).exp().mul_(g[own, None]) @ pool[columns]
            push += (similarity - lse[columns]).exp().mul_(g[columns]) @ pool[columns]
        attract = w[own, None] * (sums[labels] - 2 * z) + weighted_sums[labels]
        scale = ctx.ranks * upstream
        z_gradient = (pull + push - attract) * (scale / temperature)
        expected = (pull * z).sum(dim=1) / temperature  # sum_j g_i p_ij s_ij
        temperature_gradient = ((g[own] * positive - expected).sum() * scale / temperature).reshape(temperature.shape)
        return z_gradient, temperature_gradient, None, None, None


def _tiles(z: torch.Tensor, pool: torch.Tensor, temperature: torch.Tensor, start: int, tile: int) -> Any:
    """(columns, similarities (n, tile)) over the pool, each own row's similarity to itself at -inf."""
    rows = torch.arange(len(z), device=z.device)
    for first in range(0, len(pool), tile):
        columns = slice(first, min(first + tile, len(pool)))
        similarity = z @ pool[columns].T / temperature
        itself = rows + start - first
        inside = (itself >= 0) & (itself < columns.stop - first)
        similarity[rows[inside], itself[inside]] = -torch.inf
        yield columns, similarity


def inter_class_contrastive_loss(
    features: torch.Tensor,
    labels: torch.Tensor,
    temperature: torch.Tensor | float,
    *,
    valid: torch.Tensor | None = None,
    normalize: bool = True,
    group: dist.ProcessGroup | None = None,
    tile: int = TILE,
) -> torch.Tensor:
    """This rank's share of the supervised contrastive loss whose pool is every rank's batch.

    The mean over ranks of what is returned is L, and after the gradient averaging of data-parallel training every
    parameter's gradient is that of one process holding the whole batch. Every rank of the group must call it, with
    the same upstream gradient; a rank may hold no row at all. L is 0 where no row has a partner.

    Args:
        features: (n, D) floating point; accumulated in float32, or in float64 where given.
        labels: (n,) int64, each at least 0.
        temperature: tau > 0, a number or a trainable tensor of shape (1,).
        valid: (n,) bool; false rows are neither anchors nor keys.
        normalize: L2-normalise the features (Khosla et al. 2020); false: the paper's raw dot products.
        group: the ranks of the pool; all of them unless set.

    Raises:
        ValueError: shapes that do not fit, or a temperature that is not positive.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(f"features {tuple(features.shape)} and labels {tuple(labels.shape)} must be (n, D) and (n,)")
    precise = features if features.dtype == torch.float64 else features.float()
    if isinstance(temperature, torch.Tensor):
        tau = temperature.reshape(1).to(precise.dtype)
    else:
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        tau = precise.new_tensor([temperature])
    z = l2_normalize(precise, dim=1) if normalize else precise
    if valid is not None:
        z, labels = z[valid], labels[valid]
    return _InterClassContrast.apply(z, tau, labels, group, tile)
