"""Equation (7), every backend: against the formula anchor by anchor, and against each other."""

import math
from typing import Any

import pytest
import torch
from contrast_reference import contrast_by_hand
from hypothesis import given, settings
from hypothesis import strategies as st

from jointfuse.losses import InterClassContrastiveLoss, inter_class_contrastive_loss
from jointfuse.losses.backends import backend, tiled, triton
from jointfuse.losses.icl import contrast

# Where there is a GPU the kernels are compiled for it: tests/test_icl_gpu.py.
BACKENDS = ["reference", "tiled", *(["triton"] if triton.INTERPRETED else [])]
interpreted = pytest.mark.skipif(not triton.INTERPRETED, reason="the kernels are compiled here: tests/test_icl_gpu.py")
WIDTH = 6
Outcome = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@st.composite
def pools(draw: st.DrawFn, largest: int) -> dict[str, Any]:
    """Features (n, 6) float64, labels (n,), tau, ...: one class, all different, and everything between."""
    n = draw(st.integers(1, largest))
    classes = draw(st.sampled_from([1, 2, 3, 7, n]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    labels = (
        torch.randint(classes, (n,), generator=generator) if classes < n else torch.randperm(n, generator=generator)
    )
    # From rows that all but coincide to rows that have nothing in common.
    spread = draw(st.sampled_from([0.01, 1.0, 10.0]))
    return {
        "features": 1.0 + spread * torch.randn(n, WIDTH, generator=generator, dtype=torch.float64),
        "labels": labels,
        "tau": math.exp(draw(st.floats(math.log(0.01), 0.0))),
        "normalize": draw(st.booleans()),
        "tile": draw(st.sampled_from([1, 7, 64, 1024])),
    }


def ours(case: dict[str, Any], name: str, dtype: torch.dtype = torch.float64) -> Outcome:
    """Loss, gradient of features, gradient of temperature; the upstream gradient is 3."""
    features = case["features"].to(dtype, copy=True).requires_grad_()
    tau = torch.tensor([case["tau"]], dtype=torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiled.TILE, "cpu", case.get("tile", 1024))
        loss = inter_class_contrastive_loss(features, case["labels"], tau, normalize=case["normalize"], backend=name)
        (3 * loss).backward()
    assert features.grad is not None
    assert tau.grad is not None
    return loss.detach(), features.grad, tau.grad


def by_hand(case: dict[str, Any]) -> Outcome:
    features = case["features"].clone().requires_grad_()
    tau = torch.tensor([case["tau"]], dtype=torch.float64, requires_grad=True)
    loss = contrast_by_hand(features, case["labels"], tau, case["normalize"])
    (3 * loss).backward()
    assert features.grad is not None
    return loss.detach(), features.grad, torch.zeros_like(tau) if tau.grad is None else tau.grad


def scale(case: dict[str, Any]) -> float:
    """Size of the similarities, whose differences the loss and its gradients are."""
    norm = 1.0 if case["normalize"] else float(case["features"].norm(dim=1).max())
    return 1.0 + norm**2 / case["tau"]


@given(pools(60), st.sampled_from(["reference", "tiled"]))
def test_value_and_gradients_are_those_of_the_formula(case: dict[str, Any], name: str) -> None:
    for found, expected in zip(ours(case, name), by_hand(case), strict=True):
        slack = 1e-12 * scale(case) / case["tau"]
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=slack)


@given(pools(200))
@settings(max_examples=100)
def test_tiles_of_any_size_give_what_all_similarities_at_once_give(case: dict[str, Any]) -> None:
    for found, expected in zip(ours(case, "tiled"), ours(case, "reference"), strict=True):
        assert found.isfinite().all()
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12 * scale(case) / case["tau"])


@given(pools(200).filter(lambda case: case["normalize"]))
def test_float32_keeps_four_digits(case: dict[str, Any]) -> None:
    case["features"] = case["features"].float().double()  # so that both read the same numbers
    slack = 4e-6 * scale(case)
    for found, expected, roundings in zip(
        ours(case, "tiled", torch.float32), ours(case, "reference"), (slack, slack, slack / case["tau"]), strict=True
    ):
        assert found.dtype == torch.float32
        largest = float(expected.abs().max())
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4 * largest + roundings)


@interpreted
@pytest.mark.parametrize(("n", "width"), [(1, 1), (2, 3), (33, 16), (50, 37)])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernels_agree_with_float64(n: int, width: int, normalize: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(n)
    case = {
        "features": torch.randn(n, width, generator=generator).to(dtype).double(),
        "labels": torch.randint(5, (n,), generator=generator),
        "tau": 0.2 if normalize else 3.0,
        "normalize": normalize,
    }
    digits = 1e-5 if dtype == torch.float32 else 4e-3
    for found, expected in zip(ours(case, "triton", dtype), ours(case, "reference"), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=digits, atol=digits * float(expected.abs().max()))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("normalize", [True, False])
def test_a_row_without_partner_between_equal_rows_leaves_no_nan_at_a_small_temperature(
    normalize: bool, name: str
) -> None:
    # exp(s) overflows float32 for every pair here: 100 normalised, 900 raw.
    features = torch.full((5, 9), 1.0, requires_grad=True)
    loss = inter_class_contrastive_loss(
        features, torch.tensor([0, 1, 2, 3, 3]), 0.01, normalize=normalize, backend=name
    )
    loss.backward()
    assert loss.item() == pytest.approx(math.log(4), abs=1e-4)
    assert features.grad is not None
    assert features.grad.isfinite().all()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("labels", [[], [2], [0, 1, 2, 5]])
@pytest.mark.parametrize("normalize", [True, False])
def test_where_nobody_has_a_partner_loss_and_gradients_are_zero(labels: list[int], normalize: bool, name: str) -> None:
    features = (100 * torch.randn(len(labels), 4)).requires_grad_()
    tau = torch.tensor([0.01], requires_grad=True)
    given_labels = torch.tensor(labels, dtype=torch.long)
    loss = inter_class_contrastive_loss(features, given_labels, tau, normalize=normalize, backend=name)
    loss.backward()
    assert loss.item() == 0
    for tensor in (features, tau):
        assert tensor.grad is not None
        assert (tensor.grad == 0).all()


@pytest.mark.parametrize("name", BACKENDS)
def test_a_row_of_zeros_has_no_direction_and_gets_no_gradient(name: str) -> None:
    features = torch.randn(6, 4)
    features[2] = 0
    features.requires_grad_()
    inter_class_contrastive_loss(features, torch.tensor([0, 1, 0, 1, 0, 1]), 0.1, backend=name).backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()
    assert (features.grad[2] == 0).all()
    assert (features.grad[[0, 1, 3]] != 0).any(dim=1).all()


@pytest.mark.parametrize("name", BACKENDS)
def test_rows_that_are_not_valid_are_neither_anchors_nor_keys_and_may_hold_anything(name: str) -> None:
    features = torch.randn(7, WIDTH)
    labels = torch.tensor([0, 1, 0, 1, 1, 2, 0])
    valid = torch.tensor([True, True, False, True, False, True, True])
    features[~valid] = math.nan
    features.requires_grad_()
    loss = inter_class_contrastive_loss(features, labels, 0.3, valid=valid, backend=name)
    (gradient,) = torch.autograd.grad(loss, features)
    kept = features.detach()[valid].requires_grad_()
    expected = contrast_by_hand(kept, labels[valid], 0.3, normalize=True)
    (expected_gradient,) = torch.autograd.grad(expected, kept)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient[valid], expected_gradient, rtol=1e-4, atol=1e-6)
    assert (gradient[~valid] == 0).all()


def test_labels_may_be_any_integers() -> None:
    features, labels = torch.randn(9, 4), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 7])
    plain = inter_class_contrastive_loss(features, labels, 0.1)
    strange = inter_class_contrastive_loss(features, (labels * 10**12 - 5).to(torch.int64), 0.1)
    torch.testing.assert_close(strange, plain)
    torch.testing.assert_close(inter_class_contrastive_loss(features, labels.to(torch.int32), 0.1), plain)


@pytest.mark.parametrize(
    ("name", "dtype"), [(n, torch.bfloat16) for n in BACKENDS[:2]] + [(n, torch.float16) for n in BACKENDS]
)
def test_half_precision_features_are_accumulated_in_float32(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    features = torch.randn(40, 16).to(dtype).requires_grad_()
    labels = torch.arange(40) % 3
    loss = inter_class_contrastive_loss(features, labels, 0.05, backend=name)
    loss.backward()
    assert loss.dtype == torch.float32
    assert features.grad is not None
    assert features.grad.dtype == dtype
    # The loss sees the normalised rows in the precision they came in.
    z = (features.detach().float() / features.detach().float().norm(dim=1, keepdim=True)).to(dtype).double()
    assert loss.item() == pytest.approx(contrast_by_hand(z, labels, 0.05, False).item(), rel=1e-6)


def test_nothing_of_the_size_of_all_pairs_outlives_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiled.TILE, "cpu", 32)
    pairs, kept = 300 * 300, []
    features = torch.randn(300, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        inter_class_contrastive_loss(features, torch.arange(300) % 5, 0.1)
    assert 0 < max(kept) < pairs / 10


# --------------------------------------------------------------------------------------------------- statistics, module


def test_statistics_are_those_of_all_pairs() -> None:
    features, labels = torch.randn(30, 5, dtype=torch.float64), torch.randint(6, (30,))
    labels[0] = 9
    valid = torch.rand(30) > 0.2
    valid[0] = True
    loss = InterClassContrastiveLoss()
    loss(features, labels, valid)
    z, y = torch.nn.functional.normalize(features[valid]), labels[valid]
    s, same = z @ z.T, y == y[:, None]
    apart = ~torch.eye(len(z), dtype=torch.bool)
    found = loss.statistics
    assert found is not None
    assert found.pool == found.anchors == len(z)
    assert found.positives == int((same & apart).sum())
    assert found.negatives == int((~same).sum())
    assert found.counted == int(((same & apart).sum(1) > 0).sum()) < len(z)
    torch.testing.assert_close(found.positive, s[same & apart].mean())
    torch.testing.assert_close(found.negative, s[~same].mean())


def test_a_temperature_that_is_trained_starts_where_it_is_set() -> None:
    loss = InterClassContrastiveLoss(0.07, train_temperature=True)
    assert [name for name, _ in loss.named_parameters()] == ["temperature.logarithm"]
    features, labels = torch.randn(12, 5), torch.arange(12) % 3
    value = loss(features, labels)
    value.backward()
    torch.testing.assert_close(value, inter_class_contrastive_loss(features, labels, 0.07))
    tau = torch.tensor([0.07], dtype=torch.float64, requires_grad=True)
    contrast_by_hand(features.double(), labels, tau, True).backward()
    assert tau.grad is not None
    assert loss.temperature is not None
    assert loss.temperature.logarithm.grad is not None
    assert loss.temperature.logarithm.grad.item() == pytest.approx(tau.grad.item() * 0.07, rel=1e-4)


@pytest.mark.parametrize("name", BACKENDS)
def test_past_features_are_keys_but_not_anchors(name: str) -> None:
    torch.manual_seed(4)
    loss = InterClassContrastiveLoss(0.2, backend=name, queue=7, width=5)
    steps = [(torch.randn(n, 5), torch.randint(3, (n,))) for n in (4, 5, 3)]
    past, past_labels = torch.zeros(0, 5), torch.zeros(0, dtype=torch.long)
    for features, labels in steps:
        anchors = features.clone().requires_grad_()
        loss(anchors, labels).backward()
        wanted = features.double().clone().requires_grad_()
        keys = torch.cat([torch.nn.functional.normalize(wanted), past.double()])
        every = torch.cat([labels, past_labels])
        expected = contrast_by_hand(keys, every, 0.2, False, anchors=len(labels))
        expected.backward()
        assert anchors.grad is not None
        assert wanted.grad is not None
        torch.testing.assert_close(anchors.grad.double(), wanted.grad, rtol=1e-4, atol=1e-6)
        past = torch.cat([torch.nn.functional.normalize(features), past])[:7]
        past_labels = torch.cat([labels, past_labels])[:7]
    torch.testing.assert_close(loss.past_features, past)
    assert loss.past_labels.tolist() == past_labels.tolist()


def test_the_queue_stands_still_in_evaluation_and_travels_in_the_state() -> None:
    torch.manual_seed(4)
    loss = InterClassContrastiveLoss(0.2, queue=6, width=5)
    loss(torch.randn(4, 5), torch.randint(3, (4,)))
    other = InterClassContrastiveLoss(0.2, queue=6, width=5)
    other.load_state_dict(loss.state_dict())
    features, labels = torch.randn(3, 5), torch.tensor([0, 1, 1])
    loss.eval()
    before = [loss(features, labels) for _ in range(2)]
    assert before[0] == before[1] == other(features, labels)


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("tau", [0.0, -0.1, math.nan, math.inf])
@pytest.mark.parametrize("as_tensor", [True, False])
def test_a_temperature_that_is_not_positive_is_refused(tau: float, as_tensor: bool) -> None:
    temperature = torch.tensor([tau]) if as_tensor else tau
    with pytest.raises(ValueError, match="temperature must be positive"):
        inter_class_contrastive_loss(torch.randn(4, 2), torch.tensor([0, 0, 1, 1]), temperature)


@pytest.mark.parametrize(
    ("features", "labels", "valid", "message"),
    [
        (torch.randn(4), torch.zeros(4, dtype=torch.long), None, r"features must be \(n, D\)"),
        (torch.randn(4, 2, 1), torch.zeros(4, dtype=torch.long), None, r"features must be \(n, D\)"),
        (torch.zeros(4, 2, dtype=torch.long), torch.zeros(4, dtype=torch.long), None, "floating point"),
        (torch.randn(4, 2), torch.zeros(3, dtype=torch.long), None, r"labels \(3,\) must be \(n,\)"),
        (torch.randn(4, 2), torch.zeros(4, 1, dtype=torch.long), None, r"labels \(4, 1\) must be \(n,\)"),
        (torch.randn(4, 2), torch.zeros(4), None, "labels must be integers, got torch.float32"),
        (torch.randn(4, 2), torch.zeros(4, dtype=torch.bool), None, "labels must be integers, got torch.bool"),
        (torch.randn(4, 2), torch.zeros(4, dtype=torch.long), torch.ones(4), r"valid must be \(n,\) bool"),
        (torch.randn(4, 2), torch.zeros(4, dtype=torch.long), torch.ones(3) > 0, r"valid must be \(n,\) bool"),
    ],
)
def test_shapes_and_dtypes_that_do_not_fit_are_refused(
    features: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        inter_class_contrastive_loss(features, labels, 0.1, valid=valid)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_features_that_are_not_finite_are_named_by_row(value: float) -> None:
    features = torch.randn(6, 3)
    features[4, 1] = value
    with pytest.raises(ValueError, match="features: row 4 is not finite"):
        inter_class_contrastive_loss(features, torch.tensor([0, 0, 1, 1, 0, 1]), 0.1)


def test_an_unknown_backend_and_one_that_cannot_work_here_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="backend 'fast': choose one of auto, reference, tiled, triton"):
        backend("fast", cpu, torch.float32, 8)
    with pytest.raises(ValueError, match="backend 'triton' accumulates in float32"):
        backend("triton", cpu, torch.float64, 8)
    monkeypatch.setattr(triton, "INTERPRETED", False)
    with pytest.raises(ValueError, match="backend 'triton' needs a GPU"):
        backend("triton", cpu, torch.float32, 8)


def test_auto_says_once_what_it_chose(caplog: pytest.LogCaptureFixture) -> None:
    from jointfuse.losses import backends

    backends._say.cache_clear()
    with caplog.at_level("INFO", logger="jointfuse"):
        for _ in range(2):
            contrast(torch.randn(4, 2), torch.tensor([0, 0, 1, 1]), 0.1)
    assert [record.getMessage() for record in caplog.records] == ["contrastive loss: backend tiled on cpu"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels can be built here")
def test_auto_does_without_kernels_where_they_cannot_be_built_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    from jointfuse.losses import backends

    backends._triton_works.cache_clear()
    with caplog.at_level("WARNING", logger="jointfuse"):
        for _ in range(2):
            assert backend("auto", torch.device("cuda"), torch.bfloat16, 4096) is tiled
    (record,) = caplog.records
    assert record.getMessage().startswith("contrastive loss: Triton cannot build kernels here (")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"temperature": 0.0}, "temperature must be positive"), ({"queue": 5}, "a queue of 5 features needs their width")],
)
def test_a_module_that_cannot_work_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InterClassContrastiveLoss(**arguments)
