"""The module DeepSpeed trains: the network and its loss in one forward call."""

import torch
from torch import nn

from jointfuse.config import LossSettings
from jointfuse.data.batch import Batch
from jointfuse.losses import InterClassContrastiveLoss, classification_loss
from jointfuse.losses.gather import world_size
from jointfuse.losses.icl import Known, Statistics
from jointfuse.model.network import Network


class Objective(nn.Module):
    """L = L_ERC + icl_weight * L_ICL of one micro-batch of every rank.

    With `pool: step` and several micro-batches a step, L_ICL is taken beforehand (train/pool.py), and what is trained
    here is its gradient, pushed back through one micro-batch after the other.
    """

    def __init__(self, network: Network, settings: LossSettings, accumulation: int) -> None:
        super().__init__()
        self.network, self.settings, self.accumulation = network, settings, accumulation
        self.contrast = None
        if settings.icl_weight:
            self.contrast = InterClassContrastiveLoss(
                settings.temperature,
                train_temperature=settings.train_temperature,
                normalize=settings.normalize,
                backend=settings.backend,
                queue=settings.queue,
                width=network.feature_width,
            )
        self.pools_beforehand = bool(self.contrast) and settings.pool == "step" and accumulation > 1

    @property
    def trained_temperature(self) -> nn.Parameter | None:
        temperature = self.contrast.temperature if self.contrast else None
        return temperature.logarithm if temperature else None

    def known(self, rows: int, total: int, micro_batches: int = 1) -> Known | None:
        """Of a pool of so many micro-batches of `rows` utterances from every rank; None where the global batch has
        fillers among its rows."""
        if total < world_size() * self.accumulation * rows:
            return None
        return Known([rows * micro_batches] * world_size(), self.network.classes)

    def forward(
        self,
        batch: Batch,
        total: int,
        feature_gradient: torch.Tensor | None = None,
        temperature_gradient: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """What is minimised, `loss`, and its parts for the log: `erc`, `icl` and `statistics` of the pool.

        Args:
            batch: B utterances.
            total: real utterances in the global batch it belongs to.
            feature_gradient: (B, D), of L_ICL taken beforehand; `icl` is 0 then, and there are no `statistics`.
            temperature_gradient: (1,), likewise, in one micro-batch of the step.
        """
        logits, features = self.network(batch)
        shares = world_size() * self.accumulation
        erc = classification_loss(logits, batch.labels, batch.valid, shares, total)
        losses = {"loss": erc, "erc": erc.detach(), "icl": torch.zeros_like(erc)}
        if self.contrast is None:
            return losses
        if feature_gradient is None:
            known = self.known(len(features), total)
            icl = self.contrast(features, batch.labels, None if known else batch.valid, known)
            losses |= {"icl": icl.detach(), "statistics": stacked(self.contrast.statistics)}
        else:
            icl = (features * feature_gradient).sum()
            if temperature_gradient is not None:
                icl = icl + (self.contrast.tau() * temperature_gradient).sum()
        return losses | {"loss": erc + self.settings.icl_weight * icl}


def stacked(statistics: Statistics | None) -> torch.Tensor:
    assert statistics is not None
    return torch.stack(statistics).float()
