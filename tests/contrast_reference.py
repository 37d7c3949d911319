"""Equation (7) anchor by anchor, as it is written: what the contrastive loss is tested against."""

import torch


def contrast_by_hand(
    features: torch.Tensor,
    labels: torch.Tensor,
    temperature: torch.Tensor | float,
    normalize: bool,
    anchors: int | None = None,
) -> torch.Tensor:
    """The mean over the anchors that have a partner; the first `anchors` rows are anchors, all of them unless set."""
    z = features / features.norm(dim=1, keepdim=True) if normalize else features
    losses = []
    for i, label in enumerate(labels[:anchors].tolist()):
        others = [j for j in range(len(z)) if j != i]
        partners = [j for j in others if labels[j] == label]
        if partners:
            losses.append((z[others] @ z[i] / temperature).logsumexp(0) - (z[partners] @ z[i] / temperature).mean())
    return torch.stack(losses).mean() if losses else 0.0 * features.sum()
