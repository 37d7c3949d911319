"""The kernels on a GPU, where there is one: sizes that the interpreter cannot reach, bfloat16, and their memory."""

import pytest
import torch

from jointfuse.bench.device import peak_bytes
from jointfuse.losses import inter_class_contrastive_loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SIZES = [(1, 8), (33, 16), (1000, 129), (4097, 768), (8192, 1536)]


def outcome(
    features: torch.Tensor, labels: torch.Tensor, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    leaf = features.detach().clone().requires_grad_()
    tau = torch.tensor([0.1], dtype=torch.promote_types(features.dtype, torch.float32), device="cuda")
    tau.requires_grad_()
    loss = inter_class_contrastive_loss(leaf, labels, tau, backend=backend)
    loss.backward()
    assert leaf.grad is not None
    assert tau.grad is not None
    return loss.detach(), leaf.grad, tau.grad


@pytest.mark.parametrize(("n", "width"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["tiled", "triton"])
def test_kernels_and_tiles_agree_with_float64(n: int, width: int, dtype: torch.dtype, backend: str) -> None:
    generator = torch.Generator().manual_seed(n)
    features = torch.randn(n, width, generator=generator).to("cuda", dtype)
    labels = torch.randint(7, (n,), generator=generator).cuda()
    # Half-precision features are normalised in their own precision: float64 is given what they become.
    digits = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
    found, expected = outcome(features, labels, backend), outcome(features.double(), labels, "reference")
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(
            ours.double(), theirs, rtol=digits, atol=digits * float(theirs.abs().max()), check_dtype=False
        )


def test_the_same_input_gives_the_same_bits_where_that_is_asked_for() -> None:
    features = torch.randn(3000, 512, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(7, (3000,), device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        runs = [outcome(features, labels, "triton") for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_memory_stays_far_below_all_pairs() -> None:
    rows = 32768
    features = torch.randn(rows, 256, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(7, (rows,), device="cuda")
    outcome(features[:4096], labels[:4096], "triton")  # kernels are built and chosen
    used = peak_bytes(lambda: outcome(features, labels, "triton"))
    assert used is not None
    assert used < 0.2 * 4 * rows**2
