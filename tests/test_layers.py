"""Layers taken apart against the originals they were made of: values, gradients, dropout."""

import copy
from typing import Any

import pytest
import timm
import torch
from helpers import stir
from transformers import AutoConfig, AutoModel

from jointfuse.model.layers import LANGUAGE_FAMILIES, Layer, attention_of_any_width, language_layers, vision_layers

WIDTH, HEADS = 12, 3
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "LayerScale": {"init_values": 0.3},
    "normed queries and keys": {"qk_norm": True},
    "no bias in the projections": {"qkv_bias": False},
    "normed attention and MLP": {"scale_attn_norm": True, "scale_mlp_norm": True},
}
# From the original's parameters to ours, by the layer's kind: parts of one tensor are stacked.
BERT = {
    "query": ["attention.self.query"],
    "key_value": ["attention.self.key", "attention.self.value"],
    "out.0": ["attention.output.dense"],
    "norm1": ["attention.output.LayerNorm"],
    "mlp.0": ["intermediate.dense"],
    "mlp.2": ["output.dense"],
    "norm2": ["output.LayerNorm"],
}
MPNET = BERT | {
    "query": ["attention.attn.q"],
    "key_value": ["attention.attn.k", "attention.attn.v"],
    "out.0": ["attention.attn.o"],
    "norm1": ["attention.LayerNorm"],
}
VIT = {
    "query_norm": ["attn.q_norm"],
    "key_norm": ["attn.k_norm"],
    "out.0": ["attn.norm"],
    "out.1": ["attn.proj"],
    "out.3": ["ls1"],
    "norm1": ["norm1"],
    "mlp.0": ["mlp"],
    "mlp.1": ["ls2"],
    "norm2": ["norm2"],
}


def language(family: str, **changes: Any) -> tuple[Layer, Any]:
    torch.manual_seed(0)
    sizes = {"vocab_size": 9, "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": HEADS}
    model = AutoModel.from_config(AutoConfig.for_model(family, **sizes, intermediate_size=20, **changes)).eval()
    stir(model, 0.2)
    original = copy.deepcopy(model)
    return language_layers(model)[0], original


def vision(**arguments: Any) -> tuple[Layer, Any]:
    torch.manual_seed(0)
    sizes = {"embed_dim": WIDTH, "depth": 1, "num_heads": HEADS, "img_size": 16, "num_classes": 0}
    model = timm.create_model("vit_tiny_patch16_224", **sizes, **arguments).eval()
    stir(model, 0.2)
    original = copy.deepcopy(model).blocks[0]
    return vision_layers(model)[0], original


def given() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    mask = torch.rand(4, 7) < 0.6
    mask[:, 0] = True
    return torch.randn(4, 7, WIDTH, requires_grad=True), mask


def original_rows(model: Any, rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A transformers encoder's only layer, in its eager form, as its own encoder calls it."""
    keys = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[:, None, None, :]
    if model.config.model_type == "mpnet":
        return model.encoder.layer[0](rows, keys, model.encoder.compute_position_bias(rows))[0]
    out = model.encoder.layer[0](rows, keys)
    return out[0] if isinstance(out, tuple) else out


def expected_gradients(layer: Layer, original: Any, names: dict[str, list[str]]) -> dict[str, torch.Tensor]:
    """The original's gradients under our names."""
    theirs = {name: p.grad for name, p in original.named_parameters()}
    found: dict[str, torch.Tensor] = {}
    for name, _ in layer.named_parameters():
        ours = max((prefix for prefix in names if name.startswith(f"{prefix}.")), key=len, default=None)
        if ours:
            parts = [theirs[f"{prefix}{name.removeprefix(ours)}"] for prefix in names[ours]]
            found[name] = torch.cat([part for part in parts if part is not None])
    return found


def values_and_gradients(forward: Any, rows: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows.grad = None
    out = forward(rows, mask)
    torch.manual_seed(2)
    (out * torch.randn_like(out) * mask[..., None]).sum().backward()
    assert rows.grad is not None
    return out.detach()[mask], rows.grad.clone()


def check_same(layer: Layer, forward: Any, gradients_of_original: Any) -> None:
    """Rows, the gradient of the input and of every parameter."""
    rows, mask = given()
    ours, theirs = values_and_gradients(layer, rows, mask), values_and_gradients(forward, rows, mask)
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradients = gradients_of_original()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[name], rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("family", LANGUAGE_FAMILIES)
def test_a_language_layer_has_the_originals_values_and_gradients(family: str) -> None:
    layer, model = language(family)
    names = {name: [f"encoder.layer.0.{part}" for part in parts] for name, parts in BERT.items()}
    if family == "mpnet":
        names = {name: [f"encoder.layer.0.{part}" for part in parts] for name, parts in MPNET.items()}
        names["relative_bias"] = ["encoder.relative_attention_bias"]
    check_same(
        layer, lambda rows, mask: original_rows(model, rows, mask), lambda: expected_gradients(layer, model, names)
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_vision_layer_has_the_originals_values_and_gradients(variant: str) -> None:
    layer, block = vision(**VARIANTS[variant])
    assert sum(p.numel() for p in layer.parameters()) == sum(p.numel() for p in block.parameters())

    def gradients_of_original() -> dict[str, torch.Tensor]:
        gradients = expected_gradients(layer, block, VIT)
        for kind, together in block.attn.qkv.named_parameters():
            gradients[f"query.{kind}"], gradients[f"key_value.{kind}"] = together.grad.split([WIDTH, 2 * WIDTH])
        return gradients

    check_same(layer, lambda rows, mask: block(rows, attn_mask=mask[:, None, None, :]), gradients_of_original)


@pytest.mark.parametrize("kind", ["bert", "mpnet", "vit"])
def test_cls_alone_is_the_first_row_of_all(kind: str) -> None:
    layer = vision(qk_norm=True)[0] if kind == "vit" else language(kind)[0]
    rows, mask = given()
    whole, alone = layer(rows, mask), layer(rows, mask, cls_only=True)
    assert alone.shape == (4, 1, WIDTH)
    torch.testing.assert_close(alone, whole[:, :1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_in_training_dropout_is_drawn_where_the_original_draws_it(kind: str) -> None:
    rows, mask = given()
    if kind == "bert":
        layer, model = language("bert", hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.2)
        original = model.train().encoder.layer[0]
        forward = lambda: original(rows, mask[:, None, None, :])  # noqa: E731
    else:
        layer, original = vision(proj_drop_rate=0.3, attn_drop_rate=0.2)
        original.train()
        original.drop_path1 = original.drop_path2 = torch.nn.Identity()
        forward = lambda: original(rows, attn_mask=mask[:, None, None, :])  # noqa: E731
    layer.train()
    outcomes = []
    for run in (lambda: layer(rows, mask), forward):
        torch.manual_seed(7)
        out = run()
        outcomes.append(out[0] if isinstance(out, tuple) else out)
    torch.testing.assert_close(*outcomes, rtol=1e-5, atol=1e-5)
    assert (outcomes[0] - layer.eval()(rows, mask)).abs().max() > 0.05


def test_a_layer_is_in_the_mode_of_the_one_it_was_made_of() -> None:
    model = AutoModel.from_config(
        AutoConfig.for_model("bert", vocab_size=9, hidden_size=12, num_hidden_layers=1, num_attention_heads=3)
    )
    assert not language_layers(copy.deepcopy(model).eval())[0].training
    assert language_layers(model.train())[0].training


def test_attention_over_padded_heads_is_that_over_the_heads() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, length, 10, generator=generator, requires_grad=True) for length in (1, 7, 7))
    mask = torch.arange(7) < torch.tensor([4, 7])[:, None, None, None]
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    padded = attention_of_any_width(q, k, v, mask, 0.0)
    torch.testing.assert_close(padded, plain)
    for one, other in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (padded, plain)), strict=True):
        torch.testing.assert_close(one, other)
