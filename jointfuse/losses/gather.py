"""Rows of every rank, where ranks may hold different numbers of them.

Where several nodes have several ranks each, rows go in two steps: between the nodes, among the ranks of one place in
them, so that each row crosses the network once a node and a ring has one rank a node; then inside each node.
"""

import os
import platform
import zlib
from typing import NamedTuple

import torch
import torch.distributed as dist


class Levels(NamedTuple):
    """Ranks in two levels: rank = node * places + place."""

    nodes: int
    places: int  # ranks of a node
    across: dist.ProcessGroup  # this rank's: those of its place, one a node
    inside: dist.ProcessGroup  # ... and those of its node


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
    return _gather(numbers, ranks, group).view(ranks, -1).tolist()


def gather_rows(rows: torch.Tensor, sizes: list[int], group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """(sizes[r], ...) of every rank r -> (sum of sizes, ...) in rank order. No gradient passes through.

    Ranks with fewer rows than the largest send padding: one collective a level whatever the sizes.
    """
    rows = rows.detach().contiguous()
    if world_size(group) == 1:
        return rows
    rows = padded(rows, max(sizes))
    levels = _levels(rows.device) if group is None else None
    if levels is None:
        return without_padding(_gather(rows, len(sizes), group), sizes)
    column = _gather(rows, levels.nodes, levels.across)
    return without_padding(in_rank_order(_gather(column, levels.places, levels.inside), *levels[:2]), sizes)


def padded(rows: torch.Tensor, length: int) -> torch.Tensor:
    if len(rows) == length:
        return rows
    return torch.cat([rows, rows.new_zeros(length - len(rows), *rows.shape[1:])])


def without_padding(every: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    largest = max(sizes)
    if min(sizes) == largest:
        return every
    return torch.cat([part[:size] for part, size in zip(every.split(largest), sizes, strict=True)])


def in_rank_order(every: torch.Tensor, nodes: int, places: int) -> torch.Tensor:
    """Rows of all ranks by place and then node -> by node and then place."""
    return every.unflatten(0, (places, nodes, -1)).transpose(0, 1).flatten(0, 2)


def _gather(rows: torch.Tensor, ranks: int, group: dist.ProcessGroup | None) -> torch.Tensor:
    every = rows.new_empty(ranks * len(rows), *rows.shape[1:])
    dist.all_gather_into_tensor(every, rows, group=group)
    return every


_known: tuple[dist.ProcessGroup | None, Levels | None] = (None, None)


def _levels(device: torch.device) -> Levels | None:
    """Those of the ranks of the whole program, agreed upon once; None where a single level serves."""
    global _known
    if _known[0] is not dist.group.WORLD:
        _known = dist.group.WORLD, _agree(device)
    return _known[1]


def _agree(device: torch.device) -> Levels | None:
    """Every rank comes to the same: nobody is left in a group that others do not make."""
    ranks = dist.get_world_size()
    places = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or ranks)
    if places == ranks:  # one node: no rank of it thinks otherwise
        return None
    here = torch.tensor([places, zlib.crc32(platform.node().encode())], dtype=torch.float64, device=device)
    nodes = levels_of([(int(places), int(node)) for places, node in gather_numbers(here)])
    if nodes is None:
        return None
    mine, own = divmod(dist.get_rank(), places)
    across = [_group(range(place, ranks, places)) for place in range(places)]
    inside = [_group(range(node * places, (node + 1) * places)) for node in range(nodes)]
    return Levels(nodes, places, across[own], inside[mine])


def _group(ranks: range) -> dist.ProcessGroup:
    return dist.new_group(list(ranks))


def levels_of(told: list[tuple[int, int]]) -> int | None:
    """Nodes, where each rank tells how many ranks its node has and the node's name as a number: several nodes of as
    many ranks, several each, one after the other. None for any other arrangement."""
    places = told[0][0]
    if any(other != places for other, _ in told) or not 1 < places < len(told) or len(told) % places:
        return None
    names = [{name for _, name in told[first : first + places]} for first in range(0, len(told), places)]
    return len(names) if all(len(one) == 1 for one in names) else None
