"""Gathers in two levels: thousands of ranks in one process, and four real ones."""

import os
from itertools import chain
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks

from jointfuse.bench.device import Collectives
from jointfuse.losses import icl, inter_class_contrastive_loss
from jointfuse.losses.backends import panels
from jointfuse.losses.gather import gather_rows, in_rank_order, levels_of, padded, without_padding

pytestmark = pytest.mark.required
NODES, PLACES = 128, 8
RANKS = NODES * PLACES


def test_the_rows_of_1024_ranks_come_in_rank_order() -> None:
    sizes = [4096 - rank % 37 for rank in range(RANKS)]  # K is about 4 million
    own = torch.arange(sum(sizes)).split(sizes)
    sent = [padded(rows, max(sizes)) for rows in own]
    # Between the nodes, among ranks of one place; what every rank of a node then gives to the others.
    columns = [torch.cat(sent[place::PLACES]) for place in range(PLACES)]
    assert len(columns[0]) == NODES * 4096
    every = in_rank_order(torch.cat(columns), NODES, PLACES)
    assert torch.equal(without_padding(every, sizes), torch.arange(sum(sizes)))


def test_rows_keep_their_shape_on_the_way() -> None:
    every = torch.arange(2 * 3 * 5 * 4).view(-1, 4)
    by_place = every.view(2, 3, 5, 4).transpose(0, 1).reshape(-1, 4)
    assert torch.equal(in_rank_order(by_place, 2, 3), every)


@pytest.mark.parametrize(
    ("told", "nodes"),
    [
        ([(2, 7), (2, 7), (2, 9), (2, 9)], 2),
        ([(2, 7), (2, 9), (2, 7), (2, 9)], None),  # ranks of a node do not follow each other
        ([(3, 7), (3, 7), (3, 7), (1, 9)], None),
        ([(1, 7), (1, 8), (1, 9)], None),
        ([(4, 7)] * 4, None),
        ([(3, 7)] * 3 + [(3, 8)], None),
        ([(PLACES, rank // PLACES) for rank in range(RANKS)], NODES),
    ],
)
def test_two_levels_are_nodes_of_as_many_ranks_one_after_the_other(
    told: list[tuple[int, int]], nodes: int | None
) -> None:
    assert levels_of(told) == nodes


def two_levels() -> dict[str, object]:
    """In one of four ranks, two a node as far as they are told: what they gather, and how."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    rank = dist.get_rank()
    sizes = [3, 0, 5, 2]
    rows = 10.0 * rank + torch.arange(2.0 * sizes[rank]).view(-1, 2)
    first = gather_rows(rows, sizes)
    with Collectives() as seen:
        again = gather_rows(rows, sizes)
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(1)).split(10)[rank].requires_grad_()
    labels = (torch.arange(40) % 3).split(10)[rank]
    loss = inter_class_contrastive_loss(features, labels, 0.2)
    loss.backward()
    assert features.grad is not None
    return {
        "first": first.tolist(),
        "again": again.tolist(),
        "sent": [size for _, size in seen.given],
        "loss": loss.item(),
        "gradient": (features.grad / 4).tolist(),
    }


def test_two_nodes_of_two_ranks_gather_what_four_ranks_do(tmp_path: Path) -> None:
    ranks = run_ranks(4, two_levels, tmp_path / "ranks", limit=240)
    sizes = [3, 0, 5, 2]
    wanted = [(10.0 * rank + torch.arange(2.0 * size).view(-1, 2)).tolist() for rank, size in enumerate(sizes)]
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
    loss = inter_class_contrastive_loss(features, torch.arange(40) % 3, 0.2)
    loss.backward()
    assert features.grad is not None
    for rank in ranks:
        assert rank["first"] == rank["again"] == list(chain(*wanted))
        # Five rows of two numbers to the other node; then, inside the node, those of both.
        assert rank["sent"] == [5 * 2 * 4, 2 * 5 * 2 * 4]
    assert sum(rank["loss"] for rank in ranks) / 4 == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(torch.tensor(list(chain(*(rank["gradient"] for rank in ranks)))), features.grad)


def test_1024_ranks_in_one_process_are_one_process_with_the_whole_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    sizes = [1 + rank % 2 for rank in range(RANKS)]
    pool = torch.nn.functional.normalize(torch.randn(sum(sizes), 4, dtype=torch.float64))
    labels = torch.randint(7, (len(pool),))
    whole = pool.clone().requires_grad_()
    expected = inter_class_contrastive_loss(whole, labels, 0.1)
    expected.backward()
    s = (pool @ pool.T / 0.1).fill_diagonal_(-torch.inf)
    lse = s.logsumexp(1)
    gradients, total = [], 0.0
    for rank, (start, size) in enumerate(zip([0, *torch.tensor(sizes).cumsum(0).tolist()], sizes, strict=False)):
        own = slice(start, start + size)

        def gathered(rows: torch.Tensor, sizes: list[int], group: object = None, own: slice = own) -> torch.Tensor:
            for every in (pool, labels, lse):
                if rows.shape == every[own].shape and rows.dtype == every.dtype:
                    torch.testing.assert_close(rows.detach(), every[own])
                    return every
            raise AssertionError(rows.shape)

        monkeypatch.setattr(icl, "group_rank", lambda group, rank=rank: rank)
        monkeypatch.setattr(icl, "gather_rows", gathered)
        features = pool[own].clone().requires_grad_()
        loss, _, _ = icl.contrast(features, labels[own], 0.1, backend="reference", known=icl.Known(sizes, 7))
        loss.backward()
        total += loss.item()
        gradients.append(features.grad / RANKS)
    assert total / RANKS == pytest.approx(expected.item(), rel=1e-9)
    torch.testing.assert_close(torch.cat(gradients), whole.grad, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize(
    ("start", "n", "keys"),
    [(0, 65536, 65536), (4096 * 1023, 4096, 4096 * 1024), (4096 * 511, 4096, 4096 * 1024), (5, 1, 9)],
)
def test_panels_cover_the_own_rows_of_pools_of_any_size_in_bounded_memory(start: int, n: int, keys: int) -> None:
    found = panels.panels(start, n, keys, 1536, 2, 132)
    assert [panel.first for panel in found] == [start, *(panel.last for panel in found[:-1])]
    assert found[-1].last == start + n
    for panel in found:
        assert panel.stride >= keys - panel.first + start
        assert panel.onward >= keys - panel.first
        assert panel.onward % panels.ROOM == panel.stride % panels.ROOM == 0
        assert panel.numbers >= (panel.last - panel.first) * panel.stride
        # One block of rows has to fit whatever there is; else the bound holds.
        assert 2 * panel.numbers <= max(panels.PANEL_BYTES, 2 * panels.HEIGHT * panel.stride)
        assert panel.tiles(256) * 256 < panel.stride + 512
    if n == 65536:  # the first products: 22 blocks of rows by 6 of columns, one for each of 132 multiprocessors
        assert found[0].last - found[0].first == 22 * 128
