"""The joint-fusion block in one pass a stream beside its literal two-pass form: same weights, same input, one run."""

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModel, BertConfig

from jointfuse.bench.device import device, device_name, seconds
from jointfuse.bench.literal import LiteralBlock
from jointfuse.bench.result import write_result
from jointfuse.errors import UserError
from jointfuse.model.joint import JointBlock
from jointfuse.model.layers import language_layers, vision_layers

LARGEST_DIFFERENCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}  # of outputs; of gradients, relative to their largest
Rows = tuple[torch.Tensor, torch.Tensor]
Forward = Callable[[torch.Tensor, torch.Tensor], Rows]


@dataclass
class Case:
    """What is compared: `ours` and `literal` take t (B, 1+T, D) and m (B, 1+P, D)."""

    name: str
    ours: Forward
    literal: Forward


@dataclass
class Figures:
    case: str
    ours: float  # seconds
    literal: float
    ratio: float
    difference: float  # largest, of outputs


def benchmark_block(
    batch: int,
    patches: int,
    tokens: int,
    width: int,
    joint_vectors: int,
    dtype: str,
    repeats: int,
    out: Path | None,
    console: Console,
) -> dict[str, Any]:
    """Measure, print a table, write the result file. See `python -m jointfuse.bench block --help`.

    Raises:
        UserError: a width that heads of 64 do not divide, a precision that is none, or forms that disagree.
    """
    if width % 64:
        raise UserError(f"--width {width}: it must be a multiple of 64, the width of a head")
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {dtype}: choose float32 or bfloat16")
    precision = getattr(torch, dtype)
    torch.manual_seed(0)
    given = _inputs(batch, patches, tokens, width, precision)
    ours, literal = _stacks(width, joint_vectors, precision)
    measured: list[Figures] = []
    for case in _cases(ours, literal, given["t_mask"], given["m_mask"]):
        t, m = given["t"], given["m"]
        difference = _check_equal(case, t, m, precision)
        for step, name in ((_forward, "forward"), (_forward_backward, "forward + backward")):
            ours_takes = literal_takes = math.inf
            for _ in range(repeats):
                ours_takes = min(ours_takes, seconds(partial(step, case.ours, t, m)))
                literal_takes = min(literal_takes, seconds(partial(step, case.literal, t, m)))
            ratio = literal_takes / ours_takes
            measured.append(Figures(f"{case.name}, {name}", ours_takes, literal_takes, ratio, difference))
    console.print(_table(measured, batch, patches, tokens, width, joint_vectors, dtype))
    sizes = {"batch": batch, "patches": patches, "tokens": tokens, "width": width, "joint_vectors": joint_vectors}
    figures = {"precision": dtype, "sizes": sizes, "cases": [asdict(figure) for figure in measured]}
    return write_result("block", figures, out, console)


def _inputs(batch: int, patches: int, tokens: int, width: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Rows that want gradients, and masks in which lengths fall from whole to half."""
    given: dict[str, torch.Tensor] = {}
    for name, positions in (("t", 1 + tokens), ("m", 1 + patches)):
        given[name] = torch.randn(batch, positions, width).to(device(), dtype).requires_grad_()
        lengths = torch.linspace(positions, (positions + 1) // 2, batch).long()
        given[f"{name}_mask"] = (torch.arange(positions) < lengths[:, None]).to(device())
    return given


def _stacks(width: int, joint_vectors: int, dtype: torch.dtype) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Two blocks of each form, of the same random weights."""
    heads = width // 64
    config = BertConfig(
        vocab_size=2,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    language = AutoModel.from_config(config)
    vision: Any = timm.create_model("vit_base_patch16_224", embed_dim=width, depth=2, num_heads=heads, num_classes=0)
    ours, literal = nn.ModuleList(), nn.ModuleList()
    originals = zip(copy.deepcopy(language.encoder.layer), copy.deepcopy(vision.blocks), strict=True)
    layers = zip(language_layers(language), vision_layers(vision), strict=True)
    for (lt, vt), (original_lt, original_vt) in zip(layers, originals, strict=True):
        block = JointBlock(lt, vt, width, width, joint_vectors)
        ours.append(block)
        literal.append(LiteralBlock(original_lt, original_vt, block))
    return ours.to(device(), dtype), literal.to(device(), dtype)


def _cases(ours: nn.ModuleList, literal: nn.ModuleList, t_mask: torch.Tensor, m_mask: torch.Tensor) -> list[Case]:
    def inner(block: nn.Module, t: torch.Tensor, m: torch.Tensor) -> Rows:
        return block(t, t_mask, m, m_mask)

    def our_stack(t: torch.Tensor, m: torch.Tensor) -> Rows:
        t, m = ours[0](t, t_mask, m, m_mask)
        t, m = ours[1](t, t_mask, m, m_mask, cls_only=True)
        return t[:, 0], m[:, 0]

    def literal_stack(t: torch.Tensor, m: torch.Tensor) -> Rows:
        for block in literal:
            t, m = block(t, t_mask, m, m_mask)
        return t[:, 0], m[:, 0]

    return [
        Case("inner block", partial(inner, ours[0]), partial(inner, literal[0])),
        Case("two blocks to [CLS]", our_stack, literal_stack),
    ]


@torch.no_grad()
def _forward(forward: Forward, t: torch.Tensor, m: torch.Tensor) -> Rows:
    return forward(t, m)


def _forward_backward(forward: Forward, t: torch.Tensor, m: torch.Tensor) -> Rows:
    """Outputs; gradients of the input and of all weights are made."""
    t.grad = m.grad = None
    rows = forward(t, m)
    torch.autograd.backward(rows, [torch.ones_like(part) / part.numel() for part in rows])
    return rows


def _check_equal(case: Case, t: torch.Tensor, m: torch.Tensor, dtype: torch.dtype) -> float:
    """The largest difference of outputs. Raises UserError where outputs or the inputs' gradients are others."""
    results = []
    for form in (case.ours, case.literal):
        rows = _forward_backward(form, t, m)
        assert t.grad is not None
        assert m.grad is not None
        results.append(([part.detach().float() for part in rows], [t.grad.float(), m.grad.float()]))
    (ours, our_gradients), (literal, literal_gradients) = results
    # Nobody reads what padded rows come to, but both forms make the same of them.
    difference = max(float((a - b).abs().max()) for a, b in zip(ours, literal, strict=True))
    gradients = max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(our_gradients, literal_gradients, strict=True)
    )
    if not max(difference, gradients / 10) < LARGEST_DIFFERENCE[dtype]:
        raise UserError(
            f"{case.name}: the two forms differ by {difference:.1e}, their gradients by {gradients:.1e} of the largest"
        )
    return difference


def _table(
    measured: list[Figures], batch: int, patches: int, tokens: int, width: int, joint_vectors: int, dtype: str
) -> Table:
    sizes = f"B = {batch}, {patches} patches, {tokens} tokens, {width} wide, J = {joint_vectors}, {dtype}"
    table = Table(title=f"{device_name()}\n{sizes}", title_justify="left")
    for heading in ("what", "ours, seconds", "literal, seconds", "literal / ours", "largest difference"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for f in measured:
        table.add_row(f.case, f"{f.ours:.4f}", f"{f.literal:.4f}", f"{f.ratio:.2f}", f"{f.difference:.1e}")
    return table
