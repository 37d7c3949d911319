"""L = L_ERC + weight * L_ICL, exact over any number of ranks."""

from jointfuse.losses.erc import classification_loss
from jointfuse.losses.icl import InterClassContrastiveLoss, inter_class_contrastive_loss

__all__ = ["InterClassContrastiveLoss", "classification_loss", "inter_class_contrastive_loss"]
