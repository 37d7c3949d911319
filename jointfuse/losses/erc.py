"""The classification loss, equation (5)."""

import torch
from torch.nn.functional import cross_entropy


def classification_loss(
    logits: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor, shares: int, total: torch.Tensor | int
) -> torch.Tensor:
    """A rank's share of the mean cross-entropy over the real utterances of a global batch.

    The mean of what all `shares` (ranks x accumulation steps) return is that mean, and so are the gradients after the
    averaging that data-parallel training does, however unevenly real utterances are spread.

    Args:
        logits: (B, C).
        labels: (B,) int64.
        valid: (B,) bool; false rows take no part.
        total: real utterances in the whole global batch, over all shares; at least 1.

    Returns:
        A scalar.
    """
    losses = cross_entropy(logits.float(), labels, reduction="none")
    return torch.where(valid, losses, 0).sum() * (shares / total)
