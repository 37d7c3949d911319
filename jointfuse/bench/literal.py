"""The model as one writes it down: the original layers of transformers and timm, two passes a stream and block."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, BertConfig

from jointfuse.data.batch import Batch
from jointfuse.data.mel import FRAMES_PER_SECOND
from jointfuse.errors import UserError
from jointfuse.model.backbones import language_backbone, vision_backbone
from jointfuse.model.joint import JointBlock
from jointfuse.model.network import Network


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
        return _rows(self.language(*_together(rows, joint, mask)))

    def _vtrans(self, rows: torch.Tensor, joint: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        together, keys = _together(rows, joint, mask)
        return self.vision(together, attn_mask=keys)


def _together(rows: torch.Tensor, joint: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    keys = nn.functional.pad(mask, (0, joint.shape[1]), value=True)
    return torch.cat([rows, joint], dim=1), keys[:, None, None, :]


def _rows(out: Any) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


def _bert_layer(width: int, heads: int) -> nn.Module:
    config = BertConfig(
        vocab_size=1,
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return AutoModel.from_config(config).encoder.layer[0]


def original_language(layer: Any, like: Any) -> nn.Module:
    """A layer of transformers, built as `like`, with the weights of a Layer of ours."""
    original = copy.deepcopy(like)
    inner, outer = original.attention.self, original.attention.output
    (key, value), (key_bias, value_bias) = layer.key_value.weight.chunk(2), layer.key_value.bias.chunk(2)
    _copy(inner.query, layer.query)
    _copy_values(inner.key, weight=key, bias=key_bias)
    _copy_values(inner.value, weight=value, bias=value_bias)
    for theirs, ours in (
        (outer.dense, layer.out[0]),
        (outer.LayerNorm, layer.norm1),
        (original.intermediate.dense, layer.mlp[0]),
        (original.output.dense, layer.mlp[2]),
        (original.output.LayerNorm, layer.norm2),
    ):
        _copy(theirs, ours)
    return original


def original_vision(layer: Any, like: Any) -> nn.Module:
    """A block of timm, built as `like`, with the weights of a Layer of ours."""
    original = copy.deepcopy(like)
    attention = original.attn
    merged = {"weight": torch.cat([layer.query.weight, layer.key_value.weight])}
    if attention.qkv.bias is not None:
        merged["bias"] = torch.cat([layer.query.bias, layer.key_value.bias])
    _copy_values(attention.qkv, **merged)
    for theirs, ours in (
        (attention.q_norm, layer.query_norm),
        (attention.k_norm, layer.key_norm),
        (attention.norm, layer.out[0]),
        (attention.proj, layer.out[1]),
        (original.ls1, layer.out[3]),
        (original.norm1, layer.norm1),
        (original.mlp, layer.mlp[0]),
        (original.ls2, layer.mlp[1]),
        (original.norm2, layer.norm2),
    ):
        _copy(theirs, ours)
    return original


def _copy(theirs: nn.Module, ours: Any) -> None:
    theirs.load_state_dict(ours.state_dict())


@torch.no_grad()
def _copy_values(module: nn.Module, **values: torch.Tensor) -> None:
    for name, value in values.items():
        getattr(module, name).copy_(value)


class LiteralText(nn.Module):
    """A text encoder of transformers with the weights of ours: tokens and mask (B, T) -> (B, T, d_enc)."""

    def __init__(self, ours: Any, encoder: Any) -> None:
        super().__init__()
        _copy(encoder.embeddings, ours.embeddings)
        like = encoder.encoder.layer[0]
        encoder.encoder.layer = nn.ModuleList(original_language(layer, like) for layer in ours.layers)
        self.encoder = encoder

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.encoder(input_ids=tokens, attention_mask=mask.long()).last_hidden_state


class LiteralNetwork(nn.Module):
    """A Network's twin of the same weights, its parts under the same names. Only the input of the ViT is ours.

    Args:
        network: for both modalities, routing `modality`, its text encoder of BERT's kin.
        max_seconds: longest clip.

    Raises:
        UserError: a network of another kind.
    """

    def __init__(self, network: Network, max_seconds: float) -> None:
        super().__init__()
        settings, described = network.settings, network.descriptions
        if settings.modality != "both" or settings.routing != "modality" or not settings.joint_vectors:
            raise UserError(
                "the literal form is written for model.modality=both, model.routing=modality, joint vectors"
            )
        text: Any = language_backbone(settings.text_encoder, "", 0, described["text_encoder"])[0]
        language: Any = language_backbone(settings.language, "", 0, described["language"])[0].encoder
        if any(hasattr(encoder, "relative_attention_bias") for encoder in (language, text.encoder)):
            raise UserError("the literal form is written for encoders of BERT's kin, not for MPNet")
        frames = 1 + round(max_seconds * FRAMES_PER_SECOND)
        vision: Any = vision_backbone(settings.vision, frames, described["vision"])[0]
        ours: Any = copy.deepcopy(network)
        self.text_encoder = LiteralText(ours.text_encoder, text)
        self.vision_embed, self.vision_norm = ours.vision_embed, ours.vision_norm
        self.text_head, self.audio_head = ours.text_head, ours.audio_head
        self.extractor = ours.extractor
        if ours.extractor is not None:
            bert = _bert_layer(ours.extractor.enter.out_features, ours.extractor.layers[0].heads)
            self.extractor.layers = nn.ModuleList(original_language(layer, bert) for layer in ours.extractor.layers)
        lt, vt = language.layer[0], vision.blocks[0]
        self.language_stem = nn.ModuleList(original_language(layer, lt) for layer in ours.language_stem)
        self.vision_stem = nn.ModuleList(original_vision(layer, vt) for layer in ours.vision_stem)
        self.blocks = nn.ModuleList(
            LiteralBlock(original_language(block.language, lt), original_vision(block.vision, vt), block)
            for block in ours.blocks
        )

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, C) and features (B, d_t + d_m) of utterances that have both modalities."""
        t_mask, t_keys = batch.token_mask, batch.token_mask[:, None, None, :]
        t = self.text_encoder(batch.tokens, t_mask)
        if self.extractor is not None:
            t = self.extractor.enter(t)
            for layer in self.extractor.layers:
                t = _rows(layer(t, t_keys))
            t = self.extractor.leave(t)
        for layer in self.language_stem:
            t = _rows(layer(t, t_keys))
        m, m_mask = self.vision_embed(batch.mel, batch.frames)
        for layer in self.vision_stem:
            m = layer(m, attn_mask=m_mask[:, None, None, :])
        for block in self.blocks:
            t, m = block(t, t_mask, m, m_mask)
        t_cls, m_cls = t[:, 0], self.vision_norm(m[:, 0])
        return (self.text_head(t_cls) + self.audio_head(m_cls)) / 2, torch.cat([t_cls, m_cls], dim=1)
