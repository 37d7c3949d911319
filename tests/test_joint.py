"""One joint-fusion block against equations (1) to (4) written out."""

from typing import Any

import literal
import pytest
import timm
import torch
from helpers import gradients, stir
from transformers import AutoConfig, AutoModel

from jointfuse.model.joint import JointBlock
from jointfuse.model.layers import language_layers, vision_layers

D_T, T_HEADS, D_M, M_HEADS = 12, 3, 8, 2


def language(family: str) -> Any:
    """A transformers encoder of one layer, in float64."""
    config = AutoConfig.for_model(
        family,
        vocab_size=20,
        hidden_size=D_T,
        num_hidden_layers=1,
        num_attention_heads=T_HEADS,
        intermediate_size=16,
        layer_norm_eps=1e-12,
    )
    return AutoModel.from_config(config)


def vision(layer_scale: bool) -> Any:
    arguments = {"init_values": 0.5} if layer_scale else {}
    return timm.create_model(
        "vit_tiny_patch16_224", embed_dim=D_M, depth=1, num_heads=M_HEADS, img_size=16, num_classes=0, **arguments
    )


def make_block(joint_vectors: int, family: str = "bert", layer_scale: bool = False) -> JointBlock:
    torch.manual_seed(1)
    (lt,) = language_layers(language(family))
    (vt,) = vision_layers(vision(layer_scale))
    block = JointBlock(lt, vt, D_T, D_M, joint_vectors).double().eval()
    stir(block, 0.3)
    return block


def inputs(batch: int = 4, text: int = 6, patches: int = 9) -> dict[str, torch.Tensor]:
    """Rows with gradients, and masks with holes: mel patches stand in the order frequency x time."""
    torch.manual_seed(2)
    given = {
        "t": torch.randn(batch, text, D_T, dtype=torch.float64),
        "t_mask": torch.rand(batch, text) < 0.5,
        "m": torch.randn(batch, patches, D_M, dtype=torch.float64),
        "m_mask": torch.rand(batch, patches) < 0.5,
    }
    for name in ("t", "m"):
        given[f"{name}_mask"][:, 0] = True
        given[f"{name}_mask"][0] = True  # one without padding
        given[f"{name}_mask"][1, 1:] = False  # one with nothing but [CLS]
        given[name].requires_grad_()
    return given


def result_and_gradients(block: JointBlock, given: dict[str, torch.Tensor], forward: Any) -> dict[str, torch.Tensor]:
    block.zero_grad()
    torch.manual_seed(3)
    t, m = forward()
    # Padded rows may hold anything: nobody reads them.
    t, m = t * given["t_mask"][..., None], m * given["m_mask"][..., None]
    rows = [given["t"], given["m"]]
    loss = (t * torch.randn_like(t)).sum() + (m * torch.randn_like(m)).sum()
    loss.backward()
    found = {"t": t.detach(), "m": m.detach(), "input t": rows[0].grad, "input m": rows[1].grad, **gradients(block)}
    for row in rows:
        row.grad = None
    return found


@pytest.mark.parametrize("layer_scale", [False, True])
@pytest.mark.parametrize("family", ["bert", "mpnet"])
@pytest.mark.parametrize("joint_vectors", [0, 1, 4, 32])
def test_a_block_and_all_its_gradients_are_equations_1_to_4(joint_vectors: int, family: str, layer_scale: bool) -> None:
    block, given = make_block(joint_vectors, family, layer_scale), inputs()
    found = result_and_gradients(block, given, lambda: block(**given))
    expected = result_and_gradients(
        block, given, lambda: literal.joint_block(block, **given, t_heads=T_HEADS, m_heads=M_HEADS)
    )
    assert found.keys() == expected.keys()
    assert len(found) == 4 + len(list(block.parameters()))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("family", ["bert", "mpnet"])
@pytest.mark.parametrize("joint_vectors", [0, 4])
def test_a_block_of_cls_alone_and_its_gradients_are_those_of_the_whole_ones_cls(
    joint_vectors: int, family: str
) -> None:
    block, given = make_block(joint_vectors, family), inputs()
    first = {"t_mask": given["t_mask"][:, :1], "m_mask": given["m_mask"][:, :1]}
    found = result_and_gradients(block, given | first, lambda: block(**given, cls_only=True))
    expected = result_and_gradients(block, given | first, lambda: [rows[:, :1] for rows in block(**given)])
    assert found["t"].shape[1] == found["m"].shape[1] == 1
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")


def test_without_joint_vectors_the_streams_never_meet() -> None:
    block, given = make_block(0), inputs()
    t, m = block(**given)
    other = given | {"m": torch.randn_like(given["m"])}
    torch.testing.assert_close(block(**other)[0], t, rtol=0, atol=0)
    other = given | {"t": torch.randn_like(given["t"])}
    torch.testing.assert_close(block(**other)[1], m, rtol=0, atol=0)
    assert {name for name, _ in block.named_parameters() if name.split(".")[0] in "vufg"} == set()


def test_with_joint_vectors_each_stream_hears_of_the_other() -> None:
    block, given = make_block(1), inputs()
    t, m = block(**given)
    other_t, _ = block(**given | {"m": torch.randn_like(given["m"])})
    _, other_m = block(**given | {"t": torch.randn_like(given["t"])})
    assert ((other_t - t)[given["t_mask"]].abs() > 1e-6).any(dim=1).all()
    assert ((other_m - m)[given["m_mask"]].abs() > 1e-6).any(dim=1).all()


def test_what_is_masked_changes_nothing() -> None:
    block, given = make_block(4), inputs()
    t, m = block(**given)
    with torch.no_grad():
        given["t"][~given["t_mask"]] = 1e3
        given["m"][~given["m_mask"]] = -1e3
    other_t, other_m = block(**given)
    torch.testing.assert_close(other_t[given["t_mask"]], t[given["t_mask"]], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(other_m[given["m_mask"]], m[given["m_mask"]], rtol=1e-12, atol=1e-12)
