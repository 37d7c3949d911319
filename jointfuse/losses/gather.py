"""Rows of every rank, where ranks may hold different numbers of them."""

import torch
import torch.distributed as dist


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Ranks in the group; 1 where nothing was initialised."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def gather_rows(rows: torch.Tensor, group: dist.ProcessGroup | None = None) -> list[torch.Tensor]:
    """(n_r, ...) of every rank r, in rank order. No gradient passes through."""
    rows = rows.detach().contiguous()
    ranks = world_size(group)
    if ranks == 1:
        return [rows]
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(count) for _ in range(ranks)]
    dist.all_gather(counts, count, group=group)
    sizes = torch.cat(counts).tolist()
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(parts, padded, group=group)
    return [part[:size] for part, size in zip(parts, sizes, strict=True)]
