"""`pool: step`: the contrastive loss over every micro-batch of a step, on every rank, with the memory of one.

Every micro-batch goes forward without a graph; L_ICL and its gradient are taken once over all their features; then each
micro-batch goes forward again, with the same dropout, and its features' gradient is pushed back (Gao et al. 2021,
arXiv 2101.06983, whose hooks do not reach ZeRO's parameters: here the second pass is an ordinary micro-step).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from jointfuse.data.batch import Batch
from jointfuse.losses.icl import contrast
from jointfuse.train.objective import Objective, stacked


@dataclass(frozen=True)
class Pooled:
    """L_ICL of a step, its gradients scaled as accumulation micro-steps are, which are divided by their number."""

    features: list[torch.Tensor]  # (B, D) of each micro-batch
    temperature: torch.Tensor | None  # (1,)
    icl: torch.Tensor  # this rank's share
    statistics: torch.Tensor

    def gradients(self, number: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What micro-batch `number` pushes back; the temperature's is pushed with the last alone."""
        # ZeRO-1 averages over ranks what has a gradient in the last micro-step, and nothing else.
        return self.features[number], self.temperature if number == len(self.features) - 1 else None


def pool_step(objective: Objective, batches: list[Batch], total: int, seed: Callable[[int], None]) -> Pooled:
    """Every rank calls it, with as many micro-batches.

    Args:
        total: real utterances in the global batch they belong to.
        seed: sets the random state of micro-batch k; called before each forward pass, here and in the second.
    """
    assert objective.contrast is not None
    features = []
    with torch.no_grad():
        for number, batch in enumerate(batches):
            seed(number)
            features.append(objective.network(batch)[1])
        tau = objective.contrast.tau()
    pool = torch.cat(features).requires_grad_()
    leaves = [pool]
    if isinstance(tau, torch.Tensor):
        tau = tau.detach().clone()
        if objective.trained_temperature is not None and objective.trained_temperature.requires_grad:
            leaves.append(tau.requires_grad_())
    settings = objective.settings
    known = objective.known(len(features[0]), total, len(features))
    icl, statistics, _ = contrast(
        pool,
        torch.cat([batch.labels for batch in batches]),
        tau,
        valid=None if known else torch.cat([batch.valid for batch in batches]),
        normalize=settings.normalize,
        backend=settings.backend,
        known=known,
        finite=False,
    )
    gradients = torch.autograd.grad(icl * len(batches), leaves)
    return Pooled(
        features=list(gradients[0].split([len(part) for part in features])),
        temperature=gradients[1] if len(gradients) > 1 else None,
        icl=icl.detach(),
        statistics=stacked(statistics),
    )
