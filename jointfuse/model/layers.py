"""Transformer layers of other libraries, taken apart behind one interface.

Shapes: B utterances, S positions, D width.
"""

import copy
from typing import Any

import torch
from timm.layers import Attention
from timm.models import VisionTransformer
from timm.models.vision_transformer import Block
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig

from jointfuse.errors import UserError
from jointfuse.model.packing import packed, unpacked

HEAD_UNIT = 8  # elements, in a GPU's kernels of attention
# Encoders whose layers see no positions of their own, and MPNet, whose relative bias is supplied here.
LANGUAGE_FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "mpnet")


def require_language_family(config: PretrainedConfig, setting: str) -> None:
    """Raises UserError unless the encoder's layers can serve."""
    if config.model_type not in LANGUAGE_FAMILIES:
        raise UserError(
            f"{setting}: a '{config.model_type}' encoder cannot serve here; "
            f"choose one of the families {', '.join(LANGUAGE_FAMILIES)}"
        )


def longest_text(config: PretrainedConfig) -> int:
    """Tokens that an encoder has positions for."""
    # RoBERTa and its kin begin to count behind the padding token.
    offset = 0 if config.model_type in ("bert", "electra") else config.pad_token_id + 1
    return config.max_position_embeddings - offset


class Layer(nn.Module):
    """A pretrained transformer layer taken apart, so that its projections can serve more than one pass:
    `project` -> `attend` -> `finish`. `forward` is the original layer.

    Made by `language_layers` and `vision_layers`, which hand over the original's own modules.
    """

    def __init__(
        self,
        *,
        heads: int,
        pre_norm: bool,
        query: nn.Module,
        key_value: nn.Module,
        attention_dropout: float,
        out: nn.Module,
        norm1: nn.Module,
        mlp: nn.Module,
        norm2: nn.Module,
        query_norm: nn.Module | None = None,
        key_norm: nn.Module | None = None,
        relative_bias: nn.Embedding | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.pre_norm, self.attention_dropout = heads, pre_norm, attention_dropout
        self.query, self.key_value, self.query_norm, self.key_norm = query, key_value, query_norm, key_norm
        self.out, self.norm1, self.mlp, self.norm2 = out, norm1, mlp, norm2
        self.relative_bias = relative_bias
        self.training = query.training

    def forward(
        self, rows: torch.Tensor, mask: torch.Tensor, cls_only: bool = False, places: torch.Tensor | None = None
    ) -> torch.Tensor:
        """rows (B, S, D), mask (B, S) bool with true for real positions -> (B, S, D), or (B, 1, D) of [CLS] alone.

        With `places` (N,), where the mask is true: rows (1, N, D) packed -> (1, N, D).
        """
        queries = 1 if cls_only else rows.shape[1]
        q, k, v = self.project(rows, queries)
        if places is not None:
            q, k, v = (unpacked(x.transpose(1, 2), places, mask).transpose(1, 2) for x in (q, k, v))
        attended = self.attend(q, k, v, mask, self.position_bias(q.shape[2], k.shape[2]))
        return self.finish(rows[:, :queries], attended if places is None else packed(attended, places))

    def project(self, rows: torch.Tensor, queries: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """rows (B, S, D) -> queries of the first rows, keys and values of all, (B, heads, ..., D / heads)."""
        rows = self._normed(rows)
        q = self.query(rows[:, :queries]).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return self.query_norm(q) if self.query_norm else q, *self._keys(rows)

    def keys(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """rows (B, S, D) -> keys and values, (B, heads, S, D / heads)."""
        return self._keys(self._normed(rows))

    def _normed(self, rows: torch.Tensor) -> torch.Tensor:
        return self.norm1(rows) if self.pre_norm else rows

    def _keys(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = self.key_value(rows).unflatten(-1, (2, self.heads, -1)).transpose(1, 3).unbind(2)
        return self.key_norm(k) if self.key_norm else k, v

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """q (B, heads, Q, d), k and v (B, heads, K, d), mask (B, K) bool, bias (1, heads, Q, K) -> (B, Q, heads d)."""
        allowed = mask[:, None, None, :]
        if bias is not None:
            allowed = bias.masked_fill(~allowed, -torch.inf)
        dropout = self.attention_dropout if self.training else 0.0
        function = attention_of_any_width if q.is_cuda else nn.functional.scaled_dot_product_attention
        return function(q, k, v, attn_mask=allowed, dropout_p=dropout).transpose(1, 2).flatten(2)

    def finish(self, rows: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """What the layer makes of its input rows (B, S, D) and what they attended to (B, S, D)."""
        if self.pre_norm:
            rows = rows + self.out(attended)
            return rows + self.mlp(self.norm2(rows))
        rows = self.norm1(rows + self.out(attended))
        return self.norm2(rows + self.mlp(rows))

    def position_bias(self, queries: int, keys: int, joint: int = 0) -> torch.Tensor | None:
        """(1, heads, queries, keys + joint) where the layer has relative positions, which joint vectors have not."""
        if self.relative_bias is None:
            return None
        from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

        place = torch.arange(keys, device=self.relative_bias.weight.device)
        bucket = MPNetEncoder.relative_position_bucket(place[None] - place[:queries, None])
        bias = self.relative_bias(bucket).permute(2, 0, 1)[None]
        return nn.functional.pad(bias, (0, joint))


def attention_of_any_width(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor, dropout_p: float
) -> torch.Tensor:
    """Attention by a GPU's fused kernels, which take widths of a multiple of 8: others are padded with zeros. Else
    torch falls back to one product after another and keeps every probability."""
    attention, width = nn.functional.scaled_dot_product_attention, q.shape[-1]
    if not width % HEAD_UNIT:
        return attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p)
    q, k, v = (nn.functional.pad(x, (0, -width % HEAD_UNIT)) for x in (q, k, v))
    return attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, scale=width**-0.5)[..., :width]


def language_layers(model: nn.Module) -> list[Layer]:
    """The layers of a transformers encoder of a family in LANGUAGE_FAMILIES."""
    encoder: Any = model.encoder
    relative_bias = getattr(encoder, "relative_attention_bias", None)
    return [_language_layer(layer, relative_bias) for layer in encoder.layer]


def _language_layer(layer: Any, relative_bias: nn.Embedding | None) -> Layer:
    if relative_bias is None:
        inner, outer = layer.attention.self, layer.attention.output
        query, key, value, out = inner.query, inner.key, inner.value, outer.dense
    else:
        inner, outer = layer.attention.attn, layer.attention
        query, key, value, out = inner.q, inner.k, inner.v, inner.o
    return Layer(
        heads=inner.num_attention_heads,
        pre_norm=False,
        query=query,
        key_value=_linear(torch.cat([key.weight, value.weight]), torch.cat([key.bias, value.bias])),
        attention_dropout=inner.dropout.p,
        out=nn.Sequential(out, outer.dropout),
        norm1=outer.LayerNorm,
        mlp=nn.Sequential(
            layer.intermediate.dense, layer.intermediate.intermediate_act_fn, layer.output.dense, layer.output.dropout
        ),
        norm2=layer.output.LayerNorm,
        relative_bias=copy.deepcopy(relative_bias),
    )


def vision_layers(model: Any) -> list[Layer]:
    """The blocks of a timm VisionTransformer that `serves`."""
    return [_vision_layer(block) for block in model.blocks]


def _vision_layer(block: Any) -> Layer:
    attention = block.attn
    weight, bias, width = attention.qkv.weight, attention.qkv.bias, attention.attn_dim
    return Layer(
        heads=attention.num_heads,
        pre_norm=True,
        query=_linear(weight[:width], None if bias is None else bias[:width]),
        key_value=_linear(weight[width:], None if bias is None else bias[width:]),
        query_norm=attention.q_norm,
        key_norm=attention.k_norm,
        attention_dropout=attention.attn_drop.p,
        out=nn.Sequential(attention.norm, attention.proj, attention.proj_drop, block.ls1, block.drop_path1),
        norm1=block.norm1,
        mlp=nn.Sequential(block.mlp, block.ls2, block.drop_path2),
        norm2=block.norm2,
    )


def serves(model: Any) -> bool:
    """Whether a timm model is a VisionTransformer of ordinary blocks with a class token and learned positions."""
    if type(model) is not VisionTransformer or not model.has_class_token or model.pos_embed is None:
        return False
    return all(type(block) is Block and type(block.attn) is Attention and not block.attn.gate for block in model.blocks)


@torch.no_grad()
def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    kind = {"dtype": weight.dtype, "device": weight.device}
    linear = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=bias is not None, **kind)
    linear.weight.copy_(weight)
    if bias is not None:
        linear.bias.copy_(bias)
    return linear


class Extractor(nn.Module):
    """Feature extractor between the text encoder and fusion: linear d_enc -> width, layers, linear width -> d_t."""

    def __init__(self, d_enc: int, d_t: int, layers: int, heads: int, width: int, dropout: float) -> None:
        super().__init__()
        self.enter = nn.Linear(d_enc, width)
        config = AutoConfig.for_model(
            "bert",
            vocab_size=1,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        self.layers = nn.ModuleList(language_layers(AutoModel.from_config(config)))
        self.leave = nn.Linear(width, d_t)

    def forward(self, rows: torch.Tensor, mask: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """rows (1, N, d_enc) packed, mask (B, T) bool, places (N,) -> (1, N, d_t)"""
        rows = self.enter(rows)
        for layer in self.layers:
            rows = layer(rows, mask, places=places)
        return self.leave(rows)
