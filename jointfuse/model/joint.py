"""The joint-fusion block: equations (1) to (4) of arXiv 2405.17900, each stream projected once.

Shapes: B utterances, T text tokens, P mel patches, J joint vectors, d_t and d_m the widths of text and audio.

    (_, v^) = VTrans( m (+) v )        (1)        (t', _) = LTrans( t (+) f(v^) )        (2)
    (_, u^) = LTrans( t (+) u )        (3)        (m', _) = VTrans( m (+) g(u^) )        (4)

(1) and (3) give only joint rows, (2) and (4) only feature rows, and both meet the same features with the same weights:
so the features' queries, keys and values are made once, and only the rows that are used go through the rest of a layer.
"""

import torch
from torch import nn

from jointfuse.model.layers import Layer
from jointfuse.model.recompute import Run, plainly


class JointBlock(nn.Module):
    """One language layer and one vision layer, each used in both directions, joined by trainable vectors v and u.

    Args:
        language: LTrans of this block.
        vision: VTrans of this block.
        d_t, d_m: widths of text and audio.
        joint_vectors: J; with 0 the block is its two layers, side by side.
    """

    def __init__(self, language: Layer, vision: Layer, d_t: int, d_m: int, joint_vectors: int) -> None:
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
        self,
        t: torch.Tensor,
        t_mask: torch.Tensor,
        m: torch.Tensor,
        m_mask: torch.Tensor,
        cls_only: bool = False,
        run: Run = plainly,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """t (B, 1+T, d_t), m (B, 1+P, d_m), masks (B, 1+T) and (B, 1+P) bool -> t', m' of the same shapes, or of [CLS]
        alone, (B, 1, d_t) and (B, 1, d_m). Each part of the block goes through `run`."""
        if not self.joint_vectors:
            return self.language(t, t_mask, cls_only), self.vision(m, m_mask, cls_only)
        text = _Stream(self.language, t, t_mask, cls_only, run)
        audio = _Stream(self.vision, m, m_mask, cls_only, run)
        v_hat = run(audio.asked_by, self.v)  # (1)
        u_hat = run(text.asked_by, self.u)  # (3)
        return run(text.answered, self.f(v_hat)), run(audio.answered, self.g(u_hat))  # (2), (4)


class _Stream:
    """One stream in one block: its rows are projected once for both passes."""

    def __init__(self, layer: Layer, rows: torch.Tensor, mask: torch.Tensor, cls_only: bool, run: Run) -> None:
        self.layer, self.rows, self.mask = layer, rows, mask
        self.queries = 1 if cls_only else rows.shape[1]
        self.q, self.k, self.v = run(layer.project, rows, self.queries)

    def asked_by(self, joint: torch.Tensor) -> torch.Tensor:
        """The joint rows of (1) or (3): joint (J, D), the same for every utterance -> (B, J, D)."""
        rows = joint[None]
        q, k, v = (part.expand(len(self.rows), -1, -1, -1) for part in self.layer.project(rows, len(joint)))
        return self.layer.finish(rows, self._attend(q, k, v))

    def answered(self, joint: torch.Tensor) -> torch.Tensor:
        """The feature rows of (2) or (4): joint (B, J, D) -> (B, queries, D)."""
        bias = self.layer.position_bias(self.queries, self.rows.shape[1], joint.shape[1])
        attended = self._attend(self.q, *self.layer.keys(joint), bias)
        return self.layer.finish(self.rows[:, : self.queries], attended)

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Queries to this stream's keys and those of joint vectors, which are never masked."""
        mask = nn.functional.pad(self.mask, (0, k.shape[2]), value=True)
        return self.layer.attend(q, torch.cat([self.k, k], dim=2), torch.cat([self.v, v], dim=2), mask, bias)
