"""Texts of different lengths laid end to end, so that matrix products, norms and activations see no padding.

Shapes: B utterances, T the longest one's tokens, N the tokens that are there, D width.
"""

import torch


def packed(rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """rows (B, T, ...), places (N,) of those that are there, counted through B and T -> (1, N, ...)."""
    return rows.flatten(0, 1).index_select(0, places)[None]


def unpacked(rows: torch.Tensor, places: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """rows (1, N, ...), places (N,), mask (B, T) -> (B, T, ...), zeros where nothing is."""
    everywhere = rows.new_zeros(mask.numel(), *rows.shape[2:])
    return everywhere.index_copy(0, places, rows[0]).unflatten(0, mask.shape)
