"""The joint-fusion block: equations (1) to (4) of arXiv 2405.17900.

Shapes: B utterances, T text tokens, P mel patches, J joint vectors, d_t and d_m the widths of text and audio.
"""

import torch
from torch import nn

from jointfuse.model.layers import LanguageLayer, VisionLayer


class JointBlock(nn.Module):
    """One language layer and one vision layer, each used in both directions, joined by trainable vectors v and u.

    Args:
        language: LTrans of this block.
        vision: VTrans of this block.
        d_t, d_m: widths of text and audio.
        joint_vectors: J; with 0 the block is its two layers, side by side.
    """

    def __init__(self, language: LanguageLayer, vision: VisionLayer, d_t: int, d_m: int, joint_vectors: int) -> None:
        super().__init__()
        self.language = language
        self.vision = vision
        self.joint_vectors = joint_vectors
        if joint_vectors:
            self.v = nn.Parameter(torch.randn(joint_vectors, d_m) * 0.02)
            self.u = nn.Parameter(torch.randn(joint_vectors, d_t) * 0.02)
            self.f = nn.Sequential(nn.Linear(d_m, d_t), nn.GELU(), nn.Linear(d_t, d_t))
            self.g = nn.Sequential(nn.Linear(d_t, d_m), nn.GELU(), nn.Linear(d_m, d_m))

    def forward(
        self, t: torch.Tensor, t_mask: torch.Tensor, m: torch.Tensor, m_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """t (B, 1+T, d_t), m (B, 1+P, d_m), masks (B, 1+T) and (B, 1+P) bool -> t', m' of the same shapes."""
        if not self.joint_vectors:
            return self.language(t, t_mask), self.vision(m, m_mask)
        v_hat = self._joint_rows(self.vision, m, m_mask, self.v.expand(len(m), -1, -1))  # (1) audio is asked
        t_next = self._feature_rows(self.language, t, t_mask, self.f(v_hat))  # (2) text receives the answer
        u_hat = self._joint_rows(self.language, t, t_mask, self.u.expand(len(t), -1, -1))  # (3) text is asked
        m_next = self._feature_rows(self.vision, m, m_mask, self.g(u_hat))  # (4) audio receives the answer
        return t_next, m_next

    def _joint_rows(
        self, layer: nn.Module, rows: torch.Tensor, mask: torch.Tensor, joint: torch.Tensor
    ) -> torch.Tensor:
        return self._together(layer, rows, mask, joint)[:, rows.shape[1] :]

    def _feature_rows(
        self, layer: nn.Module, rows: torch.Tensor, mask: torch.Tensor, joint: torch.Tensor
    ) -> torch.Tensor:
        return self._together(layer, rows, mask, joint)[:, : rows.shape[1]]

    def _together(self, layer: nn.Module, rows: torch.Tensor, mask: torch.Tensor, joint: torch.Tensor) -> torch.Tensor:
        unmasked = mask.new_ones(len(rows), self.joint_vectors)
        return layer(torch.cat([rows, joint], dim=1), torch.cat([mask, unmasked], dim=1), self.joint_vectors)
