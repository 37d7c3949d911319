"""Sums of rows by class, the same bits every time.

On a GPU index_add_ adds in whatever order its threads arrive, all of them to a few rows. Here a product with the
classes' indicators does it, in the rows' own precision and with sums in float32, by blocks of rows.
"""

import torch

from jointfuse.losses.parts import bfloat16_parts

BLOCK = 4096  # rows of one product; the products' results are added in their order
MOST_CLASSES = 64  # beyond, a product would do more work than adding rows


def class_sums(rows: torch.Tensor, classes: torch.Tensor, number: int, dtype: torch.dtype) -> torch.Tensor:
    """rows (M, D), classes (M,) from 0 to number - 1 -> (number, D) in `dtype`, float32 or float64."""
    if rows.is_cuda and number <= MOST_CLASSES and dtype == torch.float32:
        return by_products(rows, classes, number)
    # Repeatable on a CPU; on a GPU under torch.use_deterministic_algorithms.
    precise = rows.to(dtype)
    return precise.new_zeros(number, rows.shape[1]).index_add_(0, classes, precise)


def by_products(rows: torch.Tensor, classes: torch.Tensor, number: int) -> torch.Tensor:
    """The same in float32."""
    whole = len(rows) // BLOCK * BLOCK
    total = rows.new_zeros(number, rows.shape[1], dtype=torch.float32)
    for part in bfloat16_parts(rows) if rows.dtype == torch.float32 else [rows]:
        total += _blocks(part[:whole].unflatten(0, (-1, BLOCK)), classes[:whole].unflatten(0, (-1, BLOCK)), number)
        total += _blocks(part[None, whole:], classes[None, whole:], number)
    return total


def _blocks(rows: torch.Tensor, classes: torch.Tensor, number: int) -> torch.Tensor:
    """rows (B, M, D), classes (B, M) -> (number, D) float32."""
    if not rows.numel():
        return rows.new_zeros(number, rows.shape[2], dtype=torch.float32)
    indicators = (classes[:, None] == torch.arange(number, device=rows.device)[:, None]).to(rows.dtype)
    if rows.is_cuda:
        return torch.bmm(indicators, rows, out_dtype=torch.float32).sum(0)
    return (indicators.float() @ rows.float()).sum(0)
