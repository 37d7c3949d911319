"""Equation (7) against a dense reference by autograd, on one rank and on several."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from jointfuse.losses import inter_class_contrastive_loss

WIDTH = 6


def reference(
    features: torch.Tensor, labels: torch.Tensor, temperature: torch.Tensor | float, normalize: bool
) -> torch.Tensor:
    """Equation (7) anchor by anchor, as it is written; the mean over the anchors that have a partner."""
    z = features / features.norm(dim=1, keepdim=True) if normalize else features
    losses = []
    for i, label in enumerate(labels.tolist()):
        others = [j for j in range(len(z)) if j != i]
        partners = [j for j in others if labels[j] == label]
        if partners:
            losses.append((z[others] @ z[i] / temperature).logsumexp(0) - (z[partners] @ z[i] / temperature).mean())
    return torch.stack(losses).mean() if losses else 0.0 * features.sum()


@st.composite
def pools(draw: st.DrawFn) -> dict[str, Any]:
    """Features (n, 6) float64, labels (n,), tau, ...: one class, all different, and everything between."""
    n = draw(st.integers(1, 60))
    classes = draw(st.sampled_from([1, 2, 3, 7, n]))
    labels = draw(st.permutations(range(n))) if classes == n else draw(_lists(n, classes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    # From rows that all but coincide to rows that have nothing in common.
    spread = draw(st.sampled_from([0.01, 1.0, 10.0]))
    noise = torch.randn(n, WIDTH, generator=generator, dtype=torch.float64)
    return {
        "features": 1.0 + spread * noise,
        "labels": torch.tensor(labels),
        "tau": math.exp(draw(st.floats(math.log(0.01), 0.0))),
        "normalize": draw(st.booleans()),
        "tile": draw(st.sampled_from([1, 7, 1024])),
    }


def _lists(n: int, classes: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, classes - 1), min_size=n, max_size=n)


def ours(case: dict[str, Any], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, gradient of features, gradient of temperature; the upstream gradient is 3."""
    features = case["features"].to(dtype, copy=True).requires_grad_()
    tau = torch.tensor([case["tau"]], dtype=dtype, requires_grad=True)
    loss = inter_class_contrastive_loss(features, case["labels"], tau, normalize=case["normalize"], tile=case["tile"])
    (3 * loss).backward()
    assert features.grad is not None
    assert tau.grad is not None
    return loss.detach(), features.grad, tau.grad


def dense(case: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    features = case["features"].clone().requires_grad_()
    tau = torch.tensor([case["tau"]], dtype=torch.float64, requires_grad=True)
    loss = reference(features, case["labels"], tau, case["normalize"])
    (3 * loss).backward()
    assert features.grad is not None
    return loss.detach(), features.grad, torch.zeros_like(tau) if tau.grad is None else tau.grad


def scale(case: dict[str, Any]) -> float:
    """Size of the similarities, whose differences the loss and its gradients are."""
    norm = 1.0 if case["normalize"] else float(case["features"].norm(dim=1).max())
    return 1.0 + norm**2 / case["tau"]


@given(pools())
def test_value_and_gradients_are_those_of_the_dense_loss(case: dict[str, Any]) -> None:
    for found, expected in zip(ours(case, torch.float64), dense(case), strict=True):
        slack = 1e-12 * scale(case) / case["tau"]
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=slack)


@given(pools().filter(lambda case: case["normalize"]))
def test_float32_keeps_four_digits(case: dict[str, Any]) -> None:
    case["features"] = case["features"].float().double()  # so that both read the same numbers
    slack = 1e-6 * scale(case)
    for found, expected, roundings in zip(
        ours(case, torch.float32), dense(case), (slack, slack, slack / case["tau"]), strict=True
    ):
        assert found.dtype == torch.float32
        largest = float(expected.abs().max())
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4 * largest + roundings)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_row_without_partner_between_equal_rows_leaves_no_nan_at_a_small_temperature(normalize: bool) -> None:
    # exp(s) overflows float32 for every pair here: 100 normalised, 900 raw.
    features = torch.full((5, 9), 1.0, requires_grad=True)
    loss = inter_class_contrastive_loss(features, torch.tensor([0, 1, 2, 3, 3]), 0.01, normalize=normalize)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(4), abs=1e-4)
    assert features.grad is not None
    assert features.grad.isfinite().all()


@pytest.mark.parametrize("labels", [[], [2], [0, 1, 2, 5]])
@pytest.mark.parametrize("normalize", [True, False])
def test_where_nobody_has_a_partner_loss_and_gradients_are_zero(labels: list[int], normalize: bool) -> None:
    features = (100 * torch.randn(len(labels), 4)).requires_grad_()
    tau = torch.tensor([0.01], requires_grad=True)
    loss = inter_class_contrastive_loss(features, torch.tensor(labels, dtype=torch.long), tau, normalize=normalize)
    loss.backward()
    assert loss.item() == 0
    for tensor in (features, tau):
        assert tensor.grad is not None
        assert (tensor.grad == 0).all()


def test_rows_that_are_not_valid_are_neither_anchors_nor_keys() -> None:
    features = torch.randn(7, WIDTH, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 0, 1, 1, 2, 0])
    valid = torch.tensor([True, True, False, True, False, True, True])
    loss = inter_class_contrastive_loss(features, labels, 0.3, valid=valid)
    (gradient,) = torch.autograd.grad(loss, features)
    kept = features.detach()[valid].requires_grad_()
    expected = reference(kept, labels[valid], 0.3, normalize=True)
    (expected_gradient,) = torch.autograd.grad(expected, kept)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient[valid], expected_gradient)
    assert (gradient[~valid] == 0).all()


def test_sixteen_bit_features_are_accumulated_in_float32() -> None:
    features = torch.randn(40, 16).bfloat16().requires_grad_()
    labels = torch.arange(40) % 3
    loss = inter_class_contrastive_loss(features, labels, 0.05)
    loss.backward()
    assert loss.dtype == torch.float32
    assert features.grad is not None
    assert features.grad.dtype == torch.bfloat16
    assert loss.item() == pytest.approx(reference(features.detach().double(), labels, 0.05, True).item(), rel=1e-4)


def test_nothing_of_the_size_of_all_pairs_outlives_the_forward_pass() -> None:
    pairs, kept = 300 * 300, []
    features = torch.randn(300, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        inter_class_contrastive_loss(features, torch.arange(300) % 5, 0.1, tile=32)
    assert 0 < max(kept) < pairs / 10


@pytest.mark.parametrize("tau", [0.0, -0.1, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(tau: float) -> None:
    with pytest.raises(ValueError, match="temperature must be positive"):
        inter_class_contrastive_loss(torch.randn(4, 2), torch.tensor([0, 0, 1, 1]), tau)


@pytest.mark.parametrize(("shape", "count"), [((4,), 4), ((4, 2, 1), 4), ((4, 2), 3)])
def test_shapes_that_do_not_fit_are_refused(shape: tuple[int, ...], count: int) -> None:
    with pytest.raises(ValueError, match=r"must be \(n, D\) and \(n,\)"):
        inter_class_contrastive_loss(torch.randn(shape), torch.zeros(count, dtype=torch.long), 0.1)


# ------------------------------------------------------------------------------------------------------- several ranks

# Labels of each rank's rows; -1 marks a row that is not valid. (What a rank lacks stays empty.)
POOLS = {
    "uneven": [[0, 1, 0, 2, 1], [1, 2], [0, 0, 3]],
    "one rank has no row": [[], [0, 1, 1, 0], [2, 0]],
    "one rank has no row that counts": [[4, 5, 6], [0, 0, 1], [1, 1]],
    "partners only on other ranks": [[0, 1, 2], [0, 1, 2], [0, 1, 7]],
    "rows that are not valid": [[0, -1, 1, 0], [-1, -1], [1, 0, -1]],
    "one class": [[3, 3], [3], [3, 3, 3, 3]],
    "one row": [[], [2], []],
    "no row": [[], [], []],
}
CASES = [
    {"pool": pool, "normalize": normalize, "tau": tau, "tile": tile, "seed": seed}
    for seed, (pool, normalize, tau, tile) in enumerate(
        (pool, normalize, tau, tile)
        for pool in POOLS
        for normalize, tau, tile in ((True, 0.05, 2), (False, 0.8, 1024), (True, 1.0, 3))
    )
]


def encoder() -> nn.Module:
    torch.manual_seed(5)
    return nn.Linear(4, WIDTH, dtype=torch.float64)


def rows_of(case: dict[str, Any], world_size: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Inputs (n, 4), labels and validity of each rank. Rows beyond the last rank are dealt to the ranks there are."""
    generator = torch.Generator().manual_seed(case["seed"])
    dealt: list[list[int]] = [[] for _ in range(world_size)]
    for number, labels in enumerate(POOLS[case["pool"]]):
        dealt[number % world_size] += labels
    ranks = []
    for labels in dealt:
        given_labels = torch.tensor(labels, dtype=torch.long)
        inputs = torch.randn(len(labels), 4, generator=generator, dtype=torch.float64)
        ranks.append((inputs, given_labels.clamp_min(0), given_labels >= 0))
    return ranks


def rank_losses(world_size: int) -> list[dict[str, Any]]:
    """In a rank: loss and gradients of every case, as this rank sees them and averaged over the ranks."""
    results = []
    for case in CASES:
        inputs, labels, valid = rows_of(case, world_size)[dist.get_rank()]
        model = encoder()
        tau = torch.tensor([case["tau"]], dtype=torch.float64, requires_grad=True)
        with CountCollectives() as forward:
            loss = inter_class_contrastive_loss(
                model(inputs), labels, tau, valid=valid, normalize=case["normalize"], tile=case["tile"]
            )
        with CountCollectives() as backward:
            (2 * loss).backward()
        raw = [loss.detach(), *(p.grad for p in model.parameters()), tau.grad]
        mean = [tensor / world_size for tensor in raw]
        for tensor in mean:
            dist.all_reduce(tensor)
        results.append(
            {
                "raw": [tensor.numpy() for tensor in raw],
                "mean": [tensor.numpy() for tensor in mean],
                "forward": forward.count,
                "backward": backward.count,
            }
        )
    return results


class CountCollectives(TorchDispatchMode):
    """Counts the collectives started inside it."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function.namespace == "c10d"
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module", params=[1, 2, 3])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """rank_losses() of each rank."""
    if request.param == 1:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            return [rank_losses(1)]
        finally:
            dist.destroy_process_group()
    return run_ranks(request.param, rank_losses, tmp_path_factory.mktemp("icl") / "ranks", request.param, limit=120)


def test_ranks_differ_before_their_gradients_are_averaged(ranks: list[list[dict[str, Any]]]) -> None:
    for one, other in pairwise(ranks):
        for case, a, b in zip(CASES, one, other, strict=True):
            if case["pool"] not in ("one row", "no row"):
                assert min(np.abs(x - y).max() for x, y in zip(a["raw"], b["raw"], strict=True)) > 1e-6, case


def test_the_mean_over_ranks_is_one_process_with_the_whole_batch(ranks: list[list[dict[str, Any]]]) -> None:
    for number, case in enumerate(CASES):
        inputs, labels, valid = (torch.cat(parts) for parts in zip(*rows_of(case, len(ranks)), strict=True))
        model = encoder()
        tau = torch.tensor([case["tau"]], dtype=torch.float64, requires_grad=True)
        loss = reference(model(inputs[valid]), labels[valid], tau, case["normalize"])
        (2 * loss).backward()
        leaves = [*model.parameters(), tau]
        expected = [loss.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad for p in leaves)]
        for rank in ranks:
            for found, tensor in zip(rank[number]["mean"], expected, strict=True):
                np.testing.assert_allclose(found, tensor.numpy(), rtol=1e-6, atol=1e-12, err_msg=str(case))


def test_features_travel_forward_and_nothing_travels_backward(ranks: list[list[dict[str, Any]]]) -> None:
    for rank in ranks:
        for result in rank:
            assert result["forward"] >= (3 if len(ranks) > 1 else 0)  # features, labels, log-sum-exps
            assert result["backward"] == 0
