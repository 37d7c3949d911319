"""Transformer layers of other libraries behind one call: rows and a mask in, rows out.

Shapes: B utterances, S positions, J joint vectors (the last positions of a sequence that has them), D width.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig

from jointfuse.errors import UserError

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


class LanguageLayer(nn.Module):
    """One layer of a transformers encoder (LTrans). Joint vectors have no position: MPNet's bias is 0 for them."""

    def __init__(self, layer: nn.Module, relative_bias: nn.Embedding | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.relative_bias = copy.deepcopy(relative_bias)

    def forward(self, rows: torch.Tensor, mask: torch.Tensor, joint: int = 0) -> torch.Tensor:
        """rows (B, S, D), mask (B, S) bool with true for real positions, the last `joint` of S being joint vectors."""
        keys = mask[:, None, None, :]
        if self.relative_bias is None:
            out = self.layer(rows, keys)
        else:
            additive = torch.zeros_like(keys, dtype=rows.dtype).masked_fill(~keys, torch.finfo(rows.dtype).min)
            out = self.layer(rows, additive, self._position_bias(rows, joint))
        return out[0] if isinstance(out, tuple) else out

    def _position_bias(self, rows: torch.Tensor, joint: int) -> torch.Tensor:
        from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

        assert self.relative_bias is not None
        text = rows.shape[1] - joint
        place = torch.arange(text, device=rows.device)
        bucket = MPNetEncoder.relative_position_bucket(place[None] - place[:, None])
        bias = self.relative_bias(bucket).permute(2, 0, 1)[None]  # (1, heads, T, T)
        return nn.functional.pad(bias, (0, joint, 0, joint))


class VisionLayer(nn.Module):
    """One block of a timm VisionTransformer (VTrans)."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, rows: torch.Tensor, mask: torch.Tensor, joint: int = 0) -> torch.Tensor:
        """rows (B, S, D), mask (B, S) bool with true for real positions; `joint` changes nothing: a ViT block has no
        positions of its own."""
        return self.block(rows, attn_mask=mask[:, None, None, :])


def language_layers(model: nn.Module) -> list[LanguageLayer]:
    """The layers of a transformers encoder of a family in LANGUAGE_FAMILIES."""
    encoder: Any = model.encoder
    return [LanguageLayer(layer, getattr(encoder, "relative_attention_bias", None)) for layer in encoder.layer]


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

    def forward(self, rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """rows (B, S, d_enc), mask (B, S) bool -> (B, S, d_t)"""
        rows = self.enter(rows)
        for layer in self.layers:
            rows = layer(rows, mask)
        return self.leave(rows)
