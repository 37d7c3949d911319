"""Equations (1) to (6) as the paper writes them, in plain matrix products: what the model is tested against.

Parameters are taken from the modules; nothing of their forward passes is used.
"""

import torch
from torch.nn.functional import gelu, layer_norm

from jointfuse.model.joint import JointBlock
from jointfuse.model.layers import Layer
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


def projected(p: Parameters, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of all heads, each (B, S, D)."""
    return linear(p, "query", rows), *linear(p, "key_value", rows).chunk(2, dim=-1)


def bert_layer(
    layer: Layer, rows: torch.Tensor, mask: torch.Tensor, heads: int, bias: torch.Tensor | float = 0.0
) -> torch.Tensor:
    p = dict(layer.named_parameters())
    attended = linear(p, "out.0", attention(*projected(p, rows), heads, mask, bias))
    rows = norm(p, "norm1", rows + attended, 1e-12)
    inner = linear(p, "mlp.2", gelu(linear(p, "mlp.0", rows)))
    return norm(p, "norm2", rows + inner, 1e-12)


def mpnet_layer(layer: Layer, rows: torch.Tensor, mask: torch.Tensor, heads: int, joint: int) -> torch.Tensor:
    """The bias of each distance between tokens is one of 32; those up to 7 have one of their own."""
    assert layer.relative_bias is not None
    embedding = layer.relative_bias.weight  # (32, heads)
    text = rows.shape[1] - joint
    assert text <= 8, "farther apart, several distances share a bucket"
    bias = embedding.new_zeros(heads, rows.shape[1], rows.shape[1])
    for query in range(text):
        for key in range(text):
            bias[:, query, key] = embedding[key - query + 16 if key > query else query - key]
    return bert_layer(layer, rows, mask, heads, bias)


def vit_block(layer: Layer, rows: torch.Tensor, mask: torch.Tensor, heads: int) -> torch.Tensor:
    p = dict(layer.named_parameters())
    attended = linear(p, "out.1", attention(*projected(p, norm(p, "norm1", rows, 1e-6)), heads, mask))
    rows = rows + attended * p.get("out.3.gamma", 1.0)
    inner = linear(p, "mlp.0.fc2", gelu(linear(p, "mlp.0.fc1", norm(p, "norm2", rows, 1e-6))))
    return rows + inner * p.get("mlp.1.gamma", 1.0)


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
        if block.language.relative_bias is None:
            return bert_layer(block.language, rows, mask, t_heads)
        return mpnet_layer(block.language, rows, mask, t_heads, rows.shape[1] - features.shape[1])

    def vtrans(features: torch.Tensor, joint: torch.Tensor | None) -> torch.Tensor:
        return vit_block(block.vision, *together(features, m_mask, joint), m_heads)

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
