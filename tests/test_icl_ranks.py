"""The contrastive loss on one to four ranks: one process's numbers, its collectives, and errors on every rank."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from contrast_reference import contrast_by_hand
from distributed import run_ranks
from torch import nn

from jointfuse.bench.device import Collectives
from jointfuse.losses import inter_class_contrastive_loss
from jointfuse.losses.backends import tiled, triton

WIDTH = 6
# Labels of each rank's rows; -1 marks a row that is not valid. (What a rank lacks stays empty.)
POOLS = {
    "uneven": [[0, 1, 0, 2, 1], [1, 2], [0, 0, 3], [3]],
    "one rank has no row": [[], [0, 1, 1, 0], [2, 0], [1]],
    "one rank has no row that counts": [[4, 5, 6], [0, 0, 1], [1, 1], [0]],
    "partners only on other ranks": [[0, 1, 2], [0, 1, 2], [0, 1, 7], [2]],
    "rows that are not valid": [[0, -1, 1, 0], [-1, -1], [1, 0, -1], [-1, 0]],
    "one class": [[3, 3], [3], [3, 3, 3, 3], [3]],
    "one row": [[], [2], [], []],
    "no row": [[], [], [], []],
}
CASES: list[dict[str, Any]] = [
    {"pool": pool, "normalize": normalize, "tau": tau, "tile": tile, "seed": seed, "backend": backend, "dtype": dtype}
    for seed, (pool, normalize, tau, tile) in enumerate(
        (pool, normalize, tau, tile)
        for pool in POOLS
        for normalize, tau, tile in ((True, 0.05, 2), (False, 0.8, 1024), (True, 1.0, 3))
    )
    for backend, dtype in (
        ("reference", torch.float64),
        ("tiled", torch.float64),
        ("reference", torch.float32),
        ("tiled", torch.float32),
        *([("triton", torch.float32)] if triton.INTERPRETED else []),
    )
]


def encoder(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(5)
    return nn.Linear(4, WIDTH, dtype=torch.float64).to(dtype)


def rows_of(case: dict[str, Any], world_size: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Inputs (n, 4), labels and validity of each rank. Rows beyond the last rank are dealt to the ranks there are."""
    generator = torch.Generator().manual_seed(case["seed"])
    dealt: list[list[int]] = [[] for _ in range(world_size)]
    for number, labels in enumerate(POOLS[case["pool"]]):
        dealt[number % world_size] += labels
    ranks = []
    for labels in dealt:
        given_labels = torch.tensor(labels, dtype=torch.long)
        inputs = torch.randn(len(labels), 4, generator=generator)
        ranks.append((inputs.to(case["dtype"]), given_labels.clamp_min(0), given_labels >= 0))
    return ranks


def rank_losses(world_size: int) -> list[dict[str, Any]]:
    """In a rank: loss and gradients of every case, as this rank sees them and averaged over the ranks."""
    results, before = [], tiled.TILE["cpu"]
    for case in CASES:
        inputs, labels, valid = rows_of(case, world_size)[dist.get_rank()]
        model = encoder(case["dtype"])
        tau = torch.tensor([case["tau"]], dtype=case["dtype"], requires_grad=True)
        tiled.TILE["cpu"] = case["tile"]
        features = model(inputs)
        features.retain_grad()
        with Collectives() as forward:
            loss = inter_class_contrastive_loss(
                features, labels, tau, valid=valid, normalize=case["normalize"], backend=case["backend"]
            )
        with Collectives() as backward:
            (2 * loss).backward()
        raw = [loss.detach(), *(p.grad for p in model.parameters()), tau.grad]
        mean = [tensor / world_size for tensor in raw]
        for tensor in mean:
            dist.all_reduce(tensor)
        results.append(
            {
                "features": features.grad.numpy() / world_size,
                "raw": [tensor.numpy() for tensor in raw],
                "mean": [tensor.numpy() for tensor in mean],
                "forward": forward.given,
                "backward": backward.given,
            }
        )
    tiled.TILE["cpu"] = before
    return results


Ranks = list[list[dict[str, Any]]]


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """rank_losses() of each rank."""
    if request.param == 1:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            return [rank_losses(1)]
        finally:
            dist.destroy_process_group()
    return run_ranks(request.param, rank_losses, tmp_path_factory.mktemp("icl") / "ranks", request.param, limit=240)


def test_ranks_differ_before_their_gradients_are_averaged(ranks: Ranks) -> None:
    for one, other in pairwise(ranks):
        for case, a, b in zip(CASES, one, other, strict=True):
            if case["pool"] not in ("one row", "no row"):
                assert min(np.abs(x - y).max() for x, y in zip(a["raw"], b["raw"], strict=True)) > 1e-6, case


def test_the_mean_over_ranks_is_one_process_with_the_whole_batch(ranks: Ranks) -> None:
    for number, case in enumerate(CASES):
        inputs, labels, valid = (torch.cat(parts) for parts in zip(*rows_of(case, len(ranks)), strict=True))
        model = encoder(case["dtype"]).double()
        tau = torch.tensor([case["tau"]], dtype=case["dtype"]).double().requires_grad_()
        features = model(inputs.double())
        features.retain_grad()
        loss = contrast_by_hand(features[valid], labels[valid], tau, case["normalize"])
        (2 * loss).backward()
        leaves = [*model.parameters(), tau]
        expected = [loss.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad for p in leaves)]
        digits = 1e-6 if case["dtype"] == torch.float64 else 1e-4
        for rank in ranks:
            for found, tensor in zip(rank[number]["mean"], expected, strict=True):
                wanted = tensor.numpy()
                # In float32 relative to the largest: a sum that cancels keeps the roundings of what it is made of.
                slack = 1e-12 if digits == 1e-6 else digits * max(np.abs(wanted).max(), 1e-2)
                np.testing.assert_allclose(found, wanted, rtol=digits, atol=slack, err_msg=str(case))
        own = np.concatenate([rank[number]["features"] for rank in ranks])
        wanted = np.zeros_like(own) if features.grad is None else features.grad.numpy()
        slack = 1e-12 if digits == 1e-6 else digits * max(np.abs(wanted).max(initial=0), 1e-2)
        np.testing.assert_allclose(own, wanted, rtol=digits, atol=slack, err_msg=str(case))


def test_features_travel_once_forward_and_nothing_travels_backward(ranks: Ranks) -> None:
    for rank in ranks:
        for case, result in zip(CASES, rank, strict=True):
            assert result["backward"] == []
            largest = max(int(valid.sum()) for _, _, valid in rows_of(case, len(ranks)))
            number = case["dtype"].itemsize
            # Five figures to agree on; then, as many rows as the fullest rank has: features, labels, log-sum-exps.
            wanted = [5 * 8, largest * WIDTH * number, largest * 8, largest * number] if len(ranks) > 1 else []
            assert [bytes_sent for _, bytes_sent in result["forward"]] == wanted, case
            assert all("allgather" in name for name, _ in result["forward"])


# ------------------------------------------------------------------------------------------------- what one rank does


def faults() -> list[str]:
    """In one of three ranks: the message of every faulty call; rank 1 is the faulty one."""
    rank = dist.get_rank()
    wrong = rank == 1
    labels = torch.tensor([0, 1, 0, 1])
    bad = torch.randn(4, 3)
    bad[2, 1] = torch.nan
    calls = {
        "width": lambda: inter_class_contrastive_loss(torch.randn(4, 5 if wrong else 3), labels, 0.1),
        "precision": lambda: inter_class_contrastive_loss(
            torch.randn(4, 3, dtype=torch.float64 if wrong else torch.float32), labels, 0.1
        ),
        "not finite": lambda: inter_class_contrastive_loss(bad if wrong else torch.randn(4, 3), labels, 0.1),
        "labels": lambda: inter_class_contrastive_loss(torch.randn(4, 3), labels[:3] if wrong else labels, 0.1),
        "temperature": lambda: inter_class_contrastive_loss(torch.randn(4, 3), labels, -1.0 if wrong else 0.1),
        "temperatures": lambda: inter_class_contrastive_loss(torch.randn(4, 3), labels, 0.2 if wrong else 0.1),
    }
    messages = []
    for call in calls.values():
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            call()
        messages.append(str(caught.value))
    pair = dist.new_group([0, 2])
    if rank == 1:
        with pytest.raises(ValueError, match="rank 1 is not part of the group"):
            inter_class_contrastive_loss(torch.randn(4, 3), labels, 0.1, group=pair)
    else:
        inter_class_contrastive_loss(torch.randn(4, 3), labels, 0.1, group=pair)
    return messages


def test_what_is_wrong_on_one_rank_is_an_error_on_every_rank(tmp_path_factory: pytest.TempPathFactory) -> None:
    zero, one, two = run_ranks(3, faults, tmp_path_factory.mktemp("icl") / "faults", limit=60)
    elsewhere = "rank 1 cannot take part in the contrastive loss: its own message says why"
    assert zero == two
    assert (
        one[:3]
        == zero[:3]
        == [
            "the ranks disagree: their widths are 3, 5, 3",
            "the ranks disagree: their precisions are torch.float32, torch.float64, torch.float32",
            "features of rank 1: row 2 is not finite (rows that are not valid left out)",
        ]
    )
    assert zero[3] == elsewhere
    assert one[3] == "labels (3,) must be (n,) for features (4, 3)"
    assert one[4:] == zero[4:]
    assert zero[4] == "temperature must be positive and finite, got -1.0 of rank 1"
    assert zero[5].startswith("the ranks disagree: their temperatures are 0.1, 0.2, 0.1")
