"""The whole model: text and speech of B utterances in, class logits (5) and fused features (6) out.

Shapes: B utterances, T text tokens, P mel patches, C classes, d_t and d_m the widths of text and audio.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Self, get_args

import torch
from torch import nn

from jointfuse.config import ModelSettings, Part
from jointfuse.data.batch import Batch
from jointfuse.data.mel import FRAMES_PER_SECOND
from jointfuse.errors import UserError
from jointfuse.model.backbones import Description, language_backbone, vision_backbone
from jointfuse.model.fused import Fused
from jointfuse.model.joint import JointBlock
from jointfuse.model.layers import Extractor, Layer, language_layers, longest_text, vision_layers
from jointfuse.model.packing import packed, unpacked
from jointfuse.model.recompute import recomputed, recomputed_but_attention


class TextInput(nn.Module):
    """Text encoder: tokens (B, T) -> one of its hidden states, packed (1, N, d_enc); [CLS] is token 0."""

    def __init__(self, encoder: Any, hidden_state: int | None, setting: str) -> None:
        super().__init__()
        layers = language_layers(encoder)
        if hidden_state is not None and hidden_state > len(layers):
            raise UserError(f"{setting} = {hidden_state}: the encoder has {len(layers)} layers")
        self.embeddings = encoder.embeddings
        self.widen = getattr(encoder, "embeddings_project", None)  # ELECTRA's small ones
        self.layers = nn.ModuleList(layers[:hidden_state])

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """tokens and mask (B, T), places (N,) where the mask is true -> (1, N, d_enc)"""
        rows = packed(self.embeddings(input_ids=tokens), places)
        if self.widen is not None:
            rows = self.widen(rows)
        for layer in self.layers:
            rows = layer(rows, mask, places=places)
        return rows


class MelInput(nn.Module):
    """ViT input: log-mel (B, F, 80) -> [CLS] and patches (B, 1+P, d_m), in the order frequency x time."""

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.project = vit.patch_embed.proj
        self.patch_norm = vit.patch_embed.norm
        self.cls_token, self.reg_token, self.pos_embed = vit.cls_token, vit.reg_token, vit.pos_embed
        self.norm = vit.norm_pre
        self.dropout = vit.pos_drop
        self.prefix_has_position = not vit.no_embed_class
        self.patch: tuple[int, int] = tuple(vit.patch_embed.patch_size)
        self.grid: tuple[int, int] = tuple(vit.patch_embed.grid_size)  # frequency x time

    def forward(self, mel: torch.Tensor, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """mel (B, F, 80) with zeros behind each clip's end, frames (B,) -> rows (B, 1+P, d_m), mask (B, 1+P) bool."""
        width = self.patch[1]
        columns = -(-mel.shape[1] // width)
        image = nn.functional.pad(mel, (0, 0, 0, columns * width - mel.shape[1])).transpose(1, 2)[:, None]
        patches = self.patch_norm(self.project(image.to(self.project.weight.dtype)).flatten(2).transpose(1, 2))
        prefix = [token for token in (self.cls_token, self.reg_token) if token is not None]
        n_prefix = sum(token.shape[1] for token in prefix)
        placed = self.pos_embed[:, n_prefix:] if self.prefix_has_position else self.pos_embed
        # A clip shorter than the longest takes the first columns of the grid, so its positions never move.
        placed = placed.unflatten(1, self.grid)[:, :, :columns].flatten(1, 2)
        head = torch.cat(prefix, dim=1)
        if self.prefix_has_position:
            head = head + self.pos_embed[:, :n_prefix]
        rows = torch.cat([head.expand(len(mel), -1, -1), patches + placed], dim=1)
        heard = torch.arange(columns, device=mel.device) < -(-frames[:, None] // width)  # (B, columns)
        mask = heard[:, None].expand(-1, self.grid[0], -1).flatten(1)
        mask = torch.cat([mask.new_ones(len(mel), n_prefix), mask], dim=1)
        return self.norm(self.dropout(rows)), mask


class Network(nn.Module):
    """Text and speech through N joint-fusion blocks to logits and features.

    Args:
        settings: of the model.
        classes: C.
        max_tokens: longest text.
        max_seconds: longest clip; its grid of patches is what positions are resampled to.
        tokenizer_size: vocabulary of an encoder built from scratch.
        descriptions: of an exported model's backbones; nothing pretrained is read then.
        checkpointing, compiled: as `train.checkpointing` and `train.compile`.

    Raises:
        UserError: weights that cannot be had, backbones that cannot serve or do not fit together.
    """

    def __init__(
        self,
        settings: ModelSettings,
        classes: int,
        max_tokens: int,
        max_seconds: float,
        tokenizer_size: int = 0,
        descriptions: dict[str, Description] | None = None,
        checkpointing: str = "none",
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.settings, self.classes, self.checkpointing = settings, classes, checkpointing
        self.fused = Fused() if compiled else None
        self.descriptions: dict[str, Description] = {}
        known = descriptions or {}
        self.reads_text, self.reads_audio = settings.modality != "audio", settings.modality != "text"
        blocks, d_t, d_m = settings.blocks, 0, 0
        language: list[Layer] = []
        vision: list[Layer] = []
        if self.reads_text:
            encoder, self.descriptions["text_encoder"] = language_backbone(
                settings.text_encoder, "model.text_encoder.weights", tokenizer_size, known.get("text_encoder")
            )
            self.text_encoder = TextInput(
                encoder, settings.text_encoder.hidden_state, "model.text_encoder.hidden_state"
            )
            donor, self.descriptions["language"] = language_backbone(
                settings.language, "model.language.weights", tokenizer_size, known.get("language")
            )
            if max_tokens > longest_text(encoder.config):
                raise UserError(
                    f"data.max_tokens = {max_tokens}: the text encoder has positions for "
                    f"{longest_text(encoder.config)} tokens"
                )
            d_enc, d_t = encoder.config.hidden_size, donor.config.hidden_size
            extractor = settings.extractor
            if extractor.layers:
                self.extractor: nn.Module | None = Extractor(
                    d_enc, d_t, extractor.layers, extractor.heads, extractor.width, extractor.dropout
                )
            elif d_enc == d_t:
                self.extractor = None
            else:
                raise UserError(
                    f"model.extractor.layers = 0 needs a text encoder as wide as the language layers; "
                    f"they are {d_enc} and {d_t}"
                )
            stem, language = _choose(language_layers(donor), settings.language, blocks, "model.language")
            self.language_stem = nn.ModuleList(stem)
        if self.reads_audio:
            frames = 1 + round(max_seconds * FRAMES_PER_SECOND)
            vit, self.descriptions["vision"] = vision_backbone(settings.vision, frames, known.get("vision"))
            d_m = vit.embed_dim
            self.vision_embed = MelInput(vit)
            vision_stem, vision = _choose(vision_layers(vit), settings.vision, blocks, "model.vision")
            self.vision_stem = nn.ModuleList(vision_stem)
            self.vision_norm = vit.norm
        if settings.modality == "both":
            if settings.routing == "literal" and d_t != d_m:
                raise UserError(
                    f"model.routing = literal needs language and vision of one width; they are {d_t} and {d_m}"
                )
            self.blocks = nn.ModuleList(
                JointBlock(lt, vt, d_t, d_m, settings.joint_vectors) for lt, vt in zip(language, vision, strict=True)
            )
        else:
            self.blocks = nn.ModuleList(language or vision)
        self.dropout = nn.Dropout(settings.dropout)
        self.text_head = nn.Linear(d_t, classes) if self.reads_text else None
        self.audio_head = nn.Linear(d_m, classes) if self.reads_audio else None
        self.feature_width = d_t + d_m

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, C) and fused features (B, d_t + d_m), not normalised, both float32.

        An utterance without one modality is judged by the head of the other alone, and the missing half of its
        feature is zero.
        """
        text = self._text(batch) if self.reads_text else None
        audio = self._audio(batch) if self.reads_audio else None
        if text and audio:
            return self._fused(*text, *audio)
        rows, mask, _ = text or audio  # type: ignore[misc]
        for number, layer in enumerate(self.blocks, start=1):
            rows = self._run(layer, rows, mask, number == len(self.blocks))
        head = self.text_head or self.audio_head
        assert head is not None
        cls = rows[:, 0] if text else self.vision_norm(rows[:, 0])
        return head(self.dropout(cls)).float(), cls.float()

    def _fused(
        self,
        t: torch.Tensor,
        t_mask: torch.Tensor,
        t_present: torch.Tensor,
        m: torch.Tensor,
        m_mask: torch.Tensor,
        m_present: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.text_head is not None
        assert self.audio_head is not None
        for number, block in enumerate(self.blocks):
            if number and self.settings.routing == "literal":
                t, t_mask, t_present, m, m_mask, m_present = m, m_mask, m_present, t, t_mask, t_present
            t, m = self._run(block, t, t_mask, m, m_mask, number + 1 == len(self.blocks))
        t_cls, m_cls = t[:, 0], self.vision_norm(m[:, 0])
        # (5): the mean of two heads, over the modalities an utterance has.
        has_t, has_m = t_present[:, None].float(), m_present[:, None].float()
        logits = (
            self.text_head(self.dropout(t_cls)).float() * has_t + self.audio_head(self.dropout(m_cls)).float() * has_m
        )
        features = torch.cat([t_cls.float() * has_t, m_cls.float() * has_m], dim=1)  # (6)
        return logits / (has_t + has_m).clamp_min(1), features

    def _text(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        present = batch.token_mask.any(dim=1)
        mask = batch.token_mask.clone()
        mask[:, 0].fill_(True)  # [CLS] stands for a text that is not there: attention needs one position
        # A frozen encoder needs no graph; its dropout is off because frozen parts stay in eval mode.
        with torch.set_grad_enabled(torch.is_grad_enabled() and _trains(self.text_encoder)):
            rows = self._run(self.text_encoder, batch.tokens, mask, batch.token_places)
        if self.extractor is not None:
            rows = self._run(self.extractor, rows, mask, batch.token_places)
        for layer in self.language_stem:
            rows = self._run(layer, rows, mask, False, batch.token_places)
        return unpacked(rows, batch.token_places, mask), mask, present

    def _audio(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows, mask = self.vision_embed(batch.mel, batch.frames)
        for layer in self.vision_stem:
            rows = self._run(layer, rows, mask)
        return rows, mask, batch.frames > 0

    def _run(self, layer: nn.Module, *inputs: torch.Tensor | bool) -> Any:
        function = self.fused(layer) if self.fused and self.training else layer
        if self.checkpointing == "none" or not (self.training and torch.is_grad_enabled() and _trains(layer)):
            return function(*inputs)
        if self.checkpointing == "layer" and isinstance(layer, JointBlock):
            return layer(*inputs, run=recomputed)
        run = recomputed_but_attention if self.checkpointing == "attention" else recomputed
        return run(function, *inputs)

    def parts(self) -> Iterator[tuple[Part, str, nn.Parameter]]:
        """Every parameter with its name and the part of the model it belongs to."""
        for name, parameter in self.named_parameters():
            yield part_of(name, self.settings.modality), name, parameter

    def freeze(self, parts: Iterable[str]) -> None:
        """Stop training `parts`; they run in eval mode from here on."""
        frozen = set(parts)
        for part, _, parameter in self.parts():
            parameter.requires_grad_(part not in frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if mode:
            for module in self.modules():
                own = list(module.parameters())
                if own and not any(p.requires_grad for p in own):
                    module.train(False)
        return self


def part_of(name: str, modality: str) -> Part:
    """The part of the model that the parameter `name` of a Network belongs to."""
    first, *rest = name.split(".")
    if first == "blocks":
        inner = rest[1]
        if modality == "both" and inner in ("v", "u", "f", "g"):
            return "joint"
        if modality == "both":
            return "language" if inner == "language" else "vision"
        return "language" if modality == "text" else "vision"
    if first in ("text_head", "audio_head"):
        return "heads"
    if first == "vision_norm":
        return "vision"
    assert first in get_args(Part), name
    return first  # type: ignore[return-value]


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _choose(layers: list[Any], settings: Any, blocks: int, setting: str) -> tuple[list[Any], list[Any]]:
    """(unimodal layers, fused layers) of a checkpoint."""
    stem = settings.stem_layers
    if stem + blocks > len(layers):
        raise UserError(
            f"{setting}: {stem} stem_layers and {blocks} blocks need {stem + blocks} layers, it has {len(layers)}"
        )
    fused = layers[-blocks:] if settings.layers == "last" else layers[stem : stem + blocks]
    return layers[:stem], fused
