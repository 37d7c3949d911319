"""A micro-step on the meta device: forward and backward of the real model, with shapes in place of numbers.

Every storage that an operation makes is followed from its birth to its death, so what is held and at which moment is
counted, not derived; so are the operations of all matrix products.
"""

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from jointfuse.data.batch import Batch
from jointfuse.data.features import FrontEnd, continued_length
from jointfuse.data.mel import HOP_LENGTH, MEL_BINS
from jointfuse.train.objective import Objective

Device = Literal["gpu", "cpu"]
aten = torch.ops.aten


@dataclass(frozen=True)
class Lengths:
    """Of every utterance of a micro-batch."""

    tokens: int
    frames: int

    def __str__(self) -> str:
        return f"{self.tokens} tokens, {self.frames} frames"


@dataclass(frozen=True)
class Rehearsal:
    """Bytes beside weights and batch, and operations (two for each multiplication and addition)."""

    kept: int  # by the forward pass, for the backward pass
    peak: int  # at any moment, gradients of parameters left out: ZeRO takes them away as they come
    peak_with_gradients: int
    forward: int  # operations
    backward: int  # what is computed a second time included


def rehearse(objective: Objective, rows: int, lengths: Lengths, mode: str, device: Device) -> Rehearsal:
    """One micro-step under a mode of `train.checkpointing`, the contrastive loss left out.

    Args:
        objective: on the meta device, in the precision it is trained in.
        rows: utterances.
        device: whose kernels of attention and dropout decide what is kept.
    """
    objective.train()
    objective.network.checkpointing = mode
    batch = batch_of_shapes(rows, lengths)
    features = None
    if objective.contrast is not None:
        features = torch.empty(rows, objective.network.feature_width, device="meta")
    live = _Live()
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(live.take_gradient) for parameter in trained]
    with _kernels(device), live:
        loss = objective(batch, rows, features)["loss"]
        kept, forward = live.held, live.operations
        loss.backward()
    for hook in hooks:
        hook.remove()
    objective.zero_grad()
    return Rehearsal(kept, live.peak, live.peak_with_gradients, forward, live.operations - forward)


def front_end_peak(rows: int, lengths: Lengths) -> int:
    """Bytes at most, at any moment in which a batch is made of its clips; clips and batch included."""
    clips = torch.empty(rows, continued_length((lengths.frames - 1) * HOP_LENGTH), dtype=torch.int16, device="meta")
    frames = torch.empty(rows, dtype=torch.long, device="meta")
    masks = torch.empty(rows, 0, 2, dtype=torch.long, device="meta")
    with _Live() as live:
        FrontEnd(0.0, 1.0)(clips, frames, masks, masks)
    return live.peak + clips.nbytes


def batch_of_shapes(rows: int, lengths: Lengths) -> Batch:
    """Utterances of one length, on the meta device."""

    def tensor(*shape: int, dtype: torch.dtype = torch.long) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    return Batch(
        ids=tensor(rows),
        tokens=tensor(rows, lengths.tokens),
        token_mask=tensor(rows, lengths.tokens, dtype=torch.bool),
        token_places=tensor(rows * lengths.tokens),
        mel=tensor(rows, lengths.frames, MEL_BINS, dtype=torch.float32),
        frames=tensor(rows),
        labels=tensor(rows),
        valid=tensor(rows, dtype=torch.bool),
        cut_tokens=0,
        cut_audio=0,
        skipped=[],
    )


class _Live(TorchDispatchMode):
    """Bytes of the storages made inside that are still held, the most there ever were, and operations.

    torch's FlopCounterMode would count the same operations, but its hooks keep tensors alive.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.gradients = self.peak = self.peak_with_gradients = 0
        self.operations = 0
        self.known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._follow(leaf.untyped_storage(), given)
        if rule := flop_registry.get(function._overloadpacket):
            self.operations += rule(*args, **(kwargs or {}), out_val=result)
        self.peak = max(self.peak, self.held)
        self.peak_with_gradients = max(self.peak_with_gradients, self.held + self.gradients)
        return result

    def _follow(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, size = id(storage), storage.nbytes()
        if key in given or key in self.known:
            return
        self.held += size

        def died(_: Any) -> None:
            if self.known.pop(key, None) is not None:
                self.held -= size

        self.known[key] = weakref.ref(storage, died)

    def take_gradient(self, parameter: torch.Tensor) -> None:
        """A parameter's gradient is no longer among what is held here."""
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        if self.known.pop(id(storage), None) is not None:
            self.held -= storage.nbytes()
        self.gradients += parameter.grad.nbytes


@contextlib.contextmanager
def _kernels(device: Device) -> Iterator[None]:
    """Attention and dropout keep what they keep on the device, not what they keep on the meta device."""
    plain_attention, plain_dropout = nn.functional.scaled_dot_product_attention, nn.functional.dropout
    gpu = device == "gpu"

    def attention(*args: Any, **kwargs: Any) -> torch.Tensor:
        # A CPU has no fused kernel with dropout: then attention is a chain of products, as it is on the meta device.
        kernel = _fused_attention if gpu or not kwargs.get("dropout_p") else plain_attention
        return kernel(*args, **kwargs)

    functions: Any = nn.functional
    functions.scaled_dot_product_attention = attention
    functions.dropout = _fused_dropout if gpu else plain_dropout
    try:
        yield
    finally:
        functions.scaled_dot_product_attention, functions.dropout = plain_attention, plain_dropout


def _fused_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor, dropout_p: float = 0.0
) -> torch.Tensor:
    """The fused kernel that takes a mask; it wants numbers, 0 or -inf."""
    bias = attn_mask
    if bias.dtype == torch.bool:
        bias = torch.zeros(attn_mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~attn_mask, -torch.inf)
    bias = bias.expand(*q.shape[:3], k.shape[2])
    wanted = torch.is_grad_enabled()
    return aten._scaled_dot_product_efficient_attention(q, k, v, bias, wanted, dropout_p)[0]


def _fused_dropout(rows: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    return torch.native_dropout(rows, p, True)[0] if training and p else rows
