"""The model as one writes it down: the original layers of transformers and timm, two passes a stream and block."""

import copy
from typing import Any

import torch
from torch import nn

from jointfuse.model.joint import JointBlock


class LiteralBlock(nn.Module):
    """Equations (1) to (4) word for word: features and joint vectors go through the whole layer, twice, and what is
    not used is thrown away.

    Args:
        language: a layer of a transformers encoder (BERT's kin).
        vision: a block of a timm VisionTransformer.
        block: ours, made of the same layers; its v, u, f and g are copied.
    """

    def __init__(self, language: nn.Module, vision: nn.Module, block: JointBlock) -> None:
        super().__init__()
        self.language, self.vision = language, vision
        self.v, self.u = copy.deepcopy(block.v), copy.deepcopy(block.u)
        self.f, self.g = copy.deepcopy(block.f), copy.deepcopy(block.g)

    def forward(
        self, t: torch.Tensor, t_mask: torch.Tensor, m: torch.Tensor, m_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """t (B, 1+T, d_t), m (B, 1+P, d_m), masks bool -> t', m' of the same shapes."""
        v_hat = self._vtrans(m, self.v.expand(len(m), -1, -1), m_mask)[:, m.shape[1] :]  # (1)
        t_next = self._ltrans(t, self.f(v_hat), t_mask)[:, : t.shape[1]]  # (2)
        u_hat = self._ltrans(t, self.u.expand(len(t), -1, -1), t_mask)[:, t.shape[1] :]  # (3)
        m_next = self._vtrans(m, self.g(u_hat), m_mask)[:, : m.shape[1]]  # (4)
        return t_next, m_next

    def _ltrans(self, rows: torch.Tensor, joint: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        out: Any = self.language(*_together(rows, joint, mask))
        return out[0] if isinstance(out, tuple) else out

    def _vtrans(self, rows: torch.Tensor, joint: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        together, keys = _together(rows, joint, mask)
        return self.vision(together, attn_mask=keys)


def _together(rows: torch.Tensor, joint: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    keys = nn.functional.pad(mask, (0, joint.shape[1]), value=True)
    return torch.cat([rows, joint], dim=1), keys[:, None, None, :]
