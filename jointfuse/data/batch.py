"""Utterances put together into padded tensors."""

from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch


@dataclass(frozen=True)
class Example:
    """One utterance, ready for the model."""

    id: int
    tokens: np.ndarray  # (T,) int64; empty when the utterance has no text
    mel: torch.Tensor  # (F, 80) float32, normalised; F = 0 when it has no clip
    label: int
    cut_tokens: bool
    cut_audio: bool


@dataclass(frozen=True)
class Batch:
    """B utterances. Padding is marked by the masks; a modality an utterance lacks has no marked position."""

    ids: torch.Tensor  # (B,) int64, positions in the split's index
    tokens: torch.Tensor  # (B, T) int64
    token_mask: torch.Tensor  # (B, T) bool
    mel: torch.Tensor  # (B, F, 80) float32, zeros behind each clip's end
    frames: torch.Tensor  # (B,) int64
    labels: torch.Tensor  # (B,) int64
    valid: torch.Tensor  # (B,) bool; false: a repeat that fills the batch
    cut_tokens: int
    cut_audio: int

    def to(self, device: torch.device | str) -> Self:
        """The same batch on `device`."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return replace(self, **moved)

    def pin_memory(self) -> Self:
        pinned: dict[str, Any] = {
            field.name: value.pin_memory()
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return replace(self, **pinned)


def collate(examples: list[Example], valid: np.ndarray, pad_token: int) -> Batch:
    """Pad to the longest text and the longest clip of the batch (at least one position each)."""
    tokens = torch.full((len(examples), max(1, *(len(e.tokens) for e in examples))), pad_token, dtype=torch.long)
    token_mask = torch.zeros(tokens.shape, dtype=torch.bool)
    frames = torch.tensor([len(e.mel) for e in examples])
    mel = torch.zeros(len(examples), max(1, int(frames.max())), examples[0].mel.shape[1])
    for row, example in enumerate(examples):
        tokens[row, : len(example.tokens)] = torch.from_numpy(example.tokens)
        token_mask[row, : len(example.tokens)] = True
        mel[row, : len(example.mel)] = example.mel
    return Batch(
        ids=torch.tensor([e.id for e in examples]),
        tokens=tokens,
        token_mask=token_mask,
        mel=mel,
        frames=frames,
        labels=torch.tensor([e.label for e in examples]),
        valid=torch.from_numpy(np.asarray(valid, dtype=bool)),
        cut_tokens=sum(e.cut_tokens for e, counts in zip(examples, valid, strict=True) if counts),
        cut_audio=sum(e.cut_audio for e, counts in zip(examples, valid, strict=True) if counts),
    )
