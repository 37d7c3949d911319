"""Rows of every rank, where ranks may hold different numbers of them."""

import torch
import torch.distributed as dist


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Ranks in the group; 1 where nothing was initialised."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def group_rank(group: dist.ProcessGroup | None = None) -> int:
    """This process's rank in the group. Raises ValueError where the process is not part of it."""
    if not dist.is_initialized():
        return 0
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"rank {dist.get_rank()} is not part of the group whose pool it was asked to join")
    return rank


def gather_numbers(numbers: torch.Tensor, group: dist.ProcessGroup | None = None) -> list[list[float]]:
    """(M,) float64 of every rank, on the host: one collective, one synchronisation."""
    ranks = world_size(group)
    if ranks == 1:
        return [numbers.tolist()]
    every = numbers.new_empty(ranks * len(numbers))
    dist.all_gather_into_tensor(every, numbers, group=group)
    return every.view(ranks, -1).tolist()


def gather_rows(rows: torch.Tensor, sizes: list[int], group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """(sizes[r], ...) of every rank r -> (sum of sizes, ...) in rank order. No gradient passes through.

    Ranks with fewer rows than the largest send padding: one collective whatever the sizes.
    """
    rows = rows.detach().contiguous()
    if world_size(group) == 1:
        return rows
    largest = max(sizes)
    if len(rows) < largest:
        rows = torch.cat([rows, rows.new_zeros(largest - len(rows), *rows.shape[1:])])
    every = rows.new_empty(len(sizes) * largest, *rows.shape[1:])
    dist.all_gather_into_tensor(every, rows, group=group)
    if min(sizes) == largest:
        return every
    return torch.cat([part[:size] for part, size in zip(every.split(largest), sizes, strict=True)])
