"""Equations (1) to (6) as the paper writes them, in plain matrix products: what the model is tested against.

Parameters are taken from the modules; nothing of their forward passes is used.
"""

from typing import Any

import torch
from torch.nn.functional import gelu, layer_norm

from jointfuse.model.joint import JointBlock
from jointfuse.model.network import Network

Parameters = dict[str, torch.Tensor]


def linear(p: Parameters, name: str, rows: torch.Tensor) -> torch.Tensor:
    return rows @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def norm(p: Parameters, name: str, rows: torch.Tensor, eps: float) -> torch.Tensor:
    return layer_norm(rows, rows.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], eps)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask: torch.Tensor, bias: torch.Tensor | float = 0.0
) -> torch.Tensor:
    """q, k, v (B, S, D), mask (B, S) bool with true for real keys -> (B, S, D)"""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + bias
    scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)


def bert_layer(layer: Any, rows: torch.Tensor, mask: torch.Tensor, heads: int) -> torch.Tensor:
    p = dict(layer.named_parameters())
    q, k, v = (linear(p, f"attention.self.{name}", rows) for name in ("query", "key", "value"))
    attended = linear(p, "attention.output.dense", attention(q, k, v, heads, mask))
    rows = norm(p, "attention.output.LayerNorm", rows + attended, 1e-12)
    inner = linear(p, "output.dense", gelu(linear(p, "intermediate.dense", rows)))
    return norm(p, "output.LayerNorm", rows + inner, 1e-12)


def mpnet_layer(
    layer: Any, rows: torch.Tensor, mask: torch.Tensor, heads: int, embedding: torch.Tensor, joint: int
) -> torch.Tensor:
    """embedding (32, heads): the bias of each bucket of distances; those up to 7 have a bucket of their own."""
    text = rows.shape[1] - joint
    assert text <= 8, "farther apart, several distances share a bucket"
    bias = embedding.new_zeros(heads, rows.shape[1], rows.shape[1])
    for query in range(text):
        for key in range(text):
            bias[:, query, key] = embedding[key - query + 16 if key > query else query - key]
    p = dict(layer.named_parameters())
    q, k, v = (linear(p, f"attention.attn.{name}", rows) for name in "qkv")
    attended = linear(p, "attention.attn.o", attention(q, k, v, heads, mask, bias))
    rows = norm(p, "attention.LayerNorm", rows + attended, 1e-12)
    inner = linear(p, "output.dense", gelu(linear(p, "intermediate.dense", rows)))
    return norm(p, "output.LayerNorm", rows + inner, 1e-12)


def vit_block(block: Any, rows: torch.Tensor, mask: torch.Tensor, heads: int) -> torch.Tensor:
    p = dict(block.named_parameters())
    q, k, v = linear(p, "attn.qkv", norm(p, "norm1", rows, 1e-6)).chunk(3, dim=-1)
    attended = linear(p, "attn.proj", attention(q, k, v, heads, mask))
    rows = rows + attended * p.get("ls1.gamma", 1.0)
    inner = linear(p, "mlp.fc2", gelu(linear(p, "mlp.fc1", norm(p, "norm2", rows, 1e-6))))
    return rows + inner * p.get("ls2.gamma", 1.0)


def joint_block(
    block: JointBlock,
    t: torch.Tensor,
    t_mask: torch.Tensor,
    m: torch.Tensor,
    m_mask: torch.Tensor,
    t_heads: int,
    m_heads: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(t', m') of equations (1) to (4)."""
    p = dict(block.named_parameters())
    count = p["v"].shape[0] if "v" in p else 0

    def ltrans(features: torch.Tensor, joint: torch.Tensor | None) -> torch.Tensor:
        rows, mask = together(features, t_mask, joint)
        bias = block.language.relative_bias
        if bias is None:
            return bert_layer(block.language.layer, rows, mask, t_heads)
        return mpnet_layer(block.language.layer, rows, mask, t_heads, bias.weight, rows.shape[1] - features.shape[1])

    def vtrans(features: torch.Tensor, joint: torch.Tensor | None) -> torch.Tensor:
        return vit_block(block.vision.block, *together(features, m_mask, joint), m_heads)

    if not count:
        return ltrans(t, None), vtrans(m, None)

    def mlp(name: str, rows: torch.Tensor) -> torch.Tensor:
        return linear(p, f"{name}.2", gelu(linear(p, f"{name}.0", rows)))

    v_hat = vtrans(m, p["v"].repeat(len(m), 1, 1))[:, m.shape[1] :]  # (1)
    t_next = ltrans(t, mlp("f", v_hat))[:, : t.shape[1]]  # (2)
    u_hat = ltrans(t, p["u"].repeat(len(t), 1, 1))[:, t.shape[1] :]  # (3)
    m_next = vtrans(m, mlp("g", u_hat))[:, : m.shape[1]]  # (4)
    return t_next, m_next


def together(
    features: torch.Tensor, mask: torch.Tensor, joint: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if joint is None:
        return features, mask
    seen = torch.ones(joint.shape[:2], dtype=torch.bool)
    return torch.cat([features, joint], dim=1), torch.cat([mask, seen], dim=1)


def fused(
    network: Network,
    t: torch.Tensor,
    t_mask: torch.Tensor,
    m: torch.Tensor,
    m_mask: torch.Tensor,
    t_heads: int,
    m_heads: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (5) and features (6) of utterances that have both modalities."""
    for number, block in enumerate(network.blocks):
        if number and network.settings.routing == "literal":
            # F_{m->t}, what LTrans gave out, enters VTrans, and the other way round.
            t, m, t_mask, m_mask = m, t, m_mask, t_mask
        t, m = joint_block(block, t, t_mask, m, m_mask, t_heads, m_heads)
    p = dict(network.named_parameters())
    t_cls, m_cls = t[:, 0], norm(p, "vision_norm", m[:, 0], 1e-6)
    logits = (linear(p, "text_head", t_cls) + linear(p, "audio_head", m_cls)) / 2
    return logits, torch.cat([t_cls, m_cls], dim=1)
