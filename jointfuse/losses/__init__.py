"""L = L_ERC + weight * L_ICL, exact over any number of ranks."""

from jointfuse.losses.erc import classification_loss
from jointfuse.losses.icl import InterClassContrastiveLoss, NotFiniteError, inter_class_contrastive_loss

__all__ = ["InterClassContrastiveLoss", "NotFiniteError", "classification_loss", "inter_class_contrastive_loss"]
