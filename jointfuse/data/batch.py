"""Utterances put together into padded tensors: as they come from the disk, and as the model takes them."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch

from jointfuse.data.features import FrontEnd, continued, continued_length


@dataclass(frozen=True)
class Example:
    """One utterance, read and tokenised."""

    id: int
    tokens: np.ndarray  # (T,) int64; empty when the utterance has no text
    clip: np.ndarray  # (S,) int16; empty when it has no clip
    frames: int  # F; 0 when it has no clip
    bin_masks: np.ndarray  # (M, 2) int64, first and number
    frame_masks: np.ndarray  # (M, 2) int64
    label: int
    cut_tokens: bool
    cut_audio: bool


@dataclass(frozen=True)
class Batch:
    """B utterances as the model takes them. Padding is marked by the masks; a modality an utterance lacks has no marked
    position."""

    ids: torch.Tensor  # (B,) int64, positions in the split's index
    tokens: torch.Tensor  # (B, T) int64
    token_mask: torch.Tensor  # (B, T) bool
    token_places: torch.Tensor  # (N,) int64: where tokens are, counted through (B, T); [CLS] for no text
    mel: torch.Tensor  # (B, F, 80) float32, zeros behind each clip's end
    frames: torch.Tensor  # (B,) int64
    labels: torch.Tensor  # (B,) int64
    valid: torch.Tensor  # (B,) bool; false: a repeat that fills the batch, or skipped
    cut_tokens: int
    cut_audio: int
    skipped: list[str]  # why each utterance that was to count could not be read


@dataclass(frozen=True)
class HostBatch:
    """B utterances as they were read: clips, no spectrograms yet. See Batch for the fields they share."""

    ids: torch.Tensor
    tokens: torch.Tensor
    token_mask: torch.Tensor
    token_places: torch.Tensor
    clips: torch.Tensor  # (B, S + 512) int16, each continued at its ends, zeros behind it
    frames: torch.Tensor
    bin_masks: torch.Tensor  # (B, M, 2) int64, first and number
    frame_masks: torch.Tensor  # (B, M, 2) int64
    labels: torch.Tensor
    valid: torch.Tensor
    cut_tokens: int
    cut_audio: int
    skipped: list[str]

    def to(self, device: torch.device | str, front_end: FrontEnd) -> Batch:
        """On `device`, the spectrograms made there."""
        moved: dict[str, Any] = {name: tensor.to(device, non_blocking=True) for name, tensor in self._tensors().items()}
        heard = [moved.pop(name) for name in ("clips", "bin_masks", "frame_masks")]
        mel = front_end(heard[0], moved["frames"], *heard[1:])
        return Batch(**moved, mel=mel, cut_tokens=self.cut_tokens, cut_audio=self.cut_audio, skipped=self.skipped)

    def pin_memory(self) -> Self:
        pinned: dict[str, Any] = {name: tensor.pin_memory() for name, tensor in self._tensors().items()}
        return replace(self, **pinned)

    def _tensors(self) -> dict[str, torch.Tensor]:
        found = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in found if isinstance(value, torch.Tensor)}


def collate(examples: list[Example], valid: np.ndarray, pad_token: int, skipped: Sequence[str] = ()) -> HostBatch:
    """Pad to the longest text and the longest clip of the batch (at least one position each)."""
    tokens = np.full((len(examples), max(1, *(len(e.tokens) for e in examples))), pad_token, dtype=np.int64)
    token_mask = np.zeros(tokens.shape, dtype=bool)
    longest = max(continued_length(len(example.clip)) for example in examples)
    clips = np.empty((len(examples), longest), dtype=np.int16)
    for row, example in enumerate(examples):
        tokens[row, : len(example.tokens)] = example.tokens
        token_mask[row, : len(example.tokens)] = True
        continued(example.clip, into=clips[row])
    standing = token_mask.copy()
    standing[:, 0] = True
    counted = [example for example, counts in zip(examples, valid, strict=True) if counts]
    return HostBatch(
        ids=torch.tensor([e.id for e in examples]),
        tokens=torch.from_numpy(tokens),
        token_mask=torch.from_numpy(token_mask),
        token_places=torch.from_numpy(np.flatnonzero(standing)),
        clips=torch.from_numpy(clips),
        frames=torch.tensor([e.frames for e in examples]),
        bin_masks=torch.from_numpy(np.stack([e.bin_masks for e in examples])),
        frame_masks=torch.from_numpy(np.stack([e.frame_masks for e in examples])),
        labels=torch.tensor([e.label for e in examples]),
        valid=torch.from_numpy(np.asarray(valid, dtype=bool)),
        cut_tokens=sum(e.cut_tokens for e in counted),
        cut_audio=sum(e.cut_audio for e in counted),
        skipped=list(skipped),
    )
