"""Gradient checkpointing: what is kept for the backward pass, and what is computed a second time instead."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

Run = Callable[..., Any]  # run(function, *inputs) -> function(*inputs)

aten = torch.ops.aten
ATTENTION = [
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
]


def plainly(function: Callable[..., Any], *inputs: Any) -> Any:
    """Everything is kept."""
    return function(*inputs)


def recomputed(function: Callable[..., Any], *inputs: Any) -> Any:
    """The inputs are kept. Non-reentrant, so that ZeRO-3's hooks find the parameters whole both times."""
    return checkpoint(function, *inputs, use_reentrant=False)


def recomputed_but_attention(function: Callable[..., Any], *inputs: Any) -> Any:
    """The inputs and what attention gave out are kept: the one part of a layer that is quadratic in its length.

    Attention with dropout is a chain of small operations on a CPU, and computed again there.
    """
    kept = partial(create_selective_checkpoint_contexts, ATTENTION)
    return checkpoint(function, *inputs, use_reentrant=False, context_fn=kept)
