"""A float32 as three bfloat16: products of float32 on tensor cores, whatever digits the vendor's would keep.

Without torch.set_float32_matmul_precision they are computed apart from the tensor cores, with it at 11 bits.
"""

import torch

# Of the nine products of parts those that count in 24 bits, the smallest first.
PAIRS = ((0, 2), (2, 0), (1, 1), (0, 1), (1, 0), (0, 0))


def bfloat16_parts(numbers: torch.Tensor) -> list[torch.Tensor]:
    """Three tensors whose sum is exactly `numbers`, float32: it has as many digits as three bfloat16 together."""
    parts = []
    for _ in range(3):
        parts.append(numbers.bfloat16())
        numbers = numbers - parts[-1].float()
    return parts


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b in float32, whatever the precision of the factors."""
    if a.dtype == torch.float32 and a.is_cuda:
        add_product_of_parts(total, a, b)
    elif a.is_cuda:
        total += torch.mm(a, b, out_dtype=torch.float32)
    else:
        total.addmm_(a.float(), b.float())


def add_product_of_parts(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """The same for float32."""
    left, right = bfloat16_parts(a), bfloat16_parts(b)
    for i, j in PAIRS:
        add_product(total, left[i], right[j])
