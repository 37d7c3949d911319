"""Sums by class as products, and float32 in parts: exact, whatever blocks the rows fall into."""

import pytest
import torch

from jointfuse.losses import class_sums, parts

pytestmark = pytest.mark.required


@pytest.mark.parametrize("rows", [0, 1, 8, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_products_with_indicators_are_sums_by_class(
    rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(class_sums, "BLOCK", 8)
    features = (torch.randn(rows, 5) * torch.logspace(-4, 4, 5)).to(dtype)
    classes = torch.randint(3, (rows,))
    wanted = torch.zeros(4, 5, dtype=torch.float64).index_add_(0, classes, features.double())
    found = class_sums.by_products(features, classes, 4)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6 * float(features.double().abs().sum()))


def test_three_parts_of_a_float32_lose_nothing() -> None:
    numbers = torch.randn(1000) * torch.logspace(-20, 20, 1000)
    found = parts.bfloat16_parts(numbers)
    assert [part.dtype for part in found] == [torch.bfloat16] * 3
    assert torch.equal(sum(part.double() for part in found), numbers.double())


def test_a_product_of_parts_is_as_good_as_one_of_float32() -> None:
    a, b = torch.rand(7, 300), torch.randn(300, 5)
    total = torch.ones(7, 5)
    parts.add_product_of_parts(total, a, b)
    wanted = 1 + a.double() @ b.double()
    size = float((a.double() @ b.double().abs()).max())
    assert float((total.double() - wanted).abs().max()) < 1e-6 * size
    # One part alone, as TF32 or bfloat16 would have it, is not.
    assert float((1 + a.bfloat16().double() @ b.bfloat16().double() - wanted).abs().max()) > 1e-5 * size
