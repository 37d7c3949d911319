"""The module DeepSpeed trains: the network and its loss in one forward call."""

import math

import torch
from torch import nn

from jointfuse.config import LossSettings
from jointfuse.data.batch import Batch
from jointfuse.losses import classification_loss, inter_class_contrastive_loss
from jointfuse.losses.gather import world_size
from jointfuse.model.network import Network


class Objective(nn.Module):
    """L = L_ERC + icl_weight * L_ICL, the contrastive pool being a micro-batch of every rank.

    The logarithm of the temperature is a parameter of shape (1,) where it is trained, and is read here, in the forward
    call of the module DeepSpeed holds: elsewhere it is empty under ZeRO-3.
    """

    def __init__(self, network: Network, settings: LossSettings, accumulation: int) -> None:
        super().__init__()
        self.network, self.settings, self.accumulation = network, settings, accumulation
        if settings.train_temperature and settings.icl_weight:
            self.log_temperature = nn.Parameter(torch.tensor([math.log(settings.temperature)]))

    def forward(self, batch: Batch, total: int) -> dict[str, torch.Tensor]:
        """Loss of one micro-batch; `total` real utterances are in the global batch it belongs to."""
        logits, features = self.network(batch)
        shares = world_size() * self.accumulation
        erc = classification_loss(logits, batch.labels, batch.valid, shares, total)
        if not self.settings.icl_weight:
            return {"loss": erc, "erc": erc.detach(), "icl": torch.zeros_like(erc)}
        trained = self.settings.train_temperature
        temperature = self.log_temperature.float().exp() if trained else self.settings.temperature
        icl = inter_class_contrastive_loss(
            features, batch.labels, temperature, valid=batch.valid, normalize=self.settings.normalize
        )
        return {"loss": erc + self.settings.icl_weight * icl, "erc": erc.detach(), "icl": icl.detach()}
