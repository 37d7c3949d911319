"""Weights in: tiny checkpoints of every family, and two real ones, against the libraries they come from."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import LABELS, MAX_SECONDS, VOCABULARY, make_batch, merged, stir
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel

from jointfuse.config import BackboneSettings, ModelSettings, VisionSettings, validate
from jointfuse.data.shards import Corpus
from jointfuse.data.tokenizer import train_tokenizer
from jointfuse.errors import UserError
from jointfuse.model.backbones import language_backbone, pretrained_tokenizer, vision_backbone
from jointfuse.model.export import load_model, save_model
from jointfuse.model.layers import LANGUAGE_FAMILIES, language_layers, vision_layers
from jointfuse.model.network import MelInput, Network, TextInput

SETTING = "model.language.weights"
LAYERS = 3


def save_language(folder: Path, family: str, half: bool = False, **changes: Any) -> Any:
    """A tiny encoder of a family with weights nobody else has, saved by transformers and returned in eval mode."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 12,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 3,
        "intermediate_size": 20,
        "max_position_embeddings": 60,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    if family == "electra":
        sizes["embedding_size"] = 8  # ELECTRA's embeddings may be narrower than its layers
    torch.manual_seed(len(family))
    model = AutoModel.from_config(AutoConfig.for_model(family, **sizes | changes)).eval()
    stir(model, 0.2)
    if half:
        model.half()
    model.save_pretrained(folder)
    return model.float()


def save_vision(folder: Path, architecture: str = "vit_tiny_patch16_224", **arguments: Any) -> Any:
    """A tiny timm model for 3-channel images, in the layout that timm's local-dir reads."""
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=0, **arguments).eval()
    stir(model, 0.2)
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    size = arguments.get("img_size", 224)
    description = {
        "architecture": architecture,
        "num_classes": 0,
        "model_args": arguments,
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [3, size, size],
            "first_conv": model.pretrained_cfg["first_conv"],
            "classifier": model.pretrained_cfg["classifier"],
        },
    }
    (folder / "config.json").write_text(json.dumps(description))
    return model


VIT = {"embed_dim": 12, "depth": LAYERS, "num_heads": 3, "img_size": 32, "patch_size": 8}
VITS = {
    "plain": {},
    "LayerScale": {"init_values": 0.3},
    "registers": {"reg_tokens": 2, "init_values": 0.3},
    "registers outside the positions": {"reg_tokens": 2, "no_embed_class": True},
    "norm before the blocks": {"pre_norm": True},
    "normed queries and keys": {"qk_norm": True},
}


def language_of(folder: Path, setting: str = SETTING) -> Any:
    return language_backbone(BackboneSettings(weights=str(folder)), setting, 0)[0].eval()


def vision_of(folder: Path | str, patch: tuple[int, int], frames: int) -> Any:
    return vision_backbone(VisionSettings(weights=str(folder), patch=patch), frames)[0].eval()


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    batch = make_batch(tokens=[41, 7, 1, 20], frames=[0, 0, 0, 0])
    return batch.tokens, batch.token_mask


# ------------------------------------------------------------------------------------------------------------ language


def check_language(encoder: Any, original: Any) -> None:
    """Layer by layer the same, with padding."""
    tokens, mask = texts()
    with torch.no_grad():
        states = original(tokens, attention_mask=mask.long(), output_hidden_states=True).hidden_states
        rows = states[0]
        layers = language_layers(encoder)
        assert len(layers) == len(states) - 1
        for layer, expected in zip(layers, states[1:], strict=True):
            rows = layer(rows, mask)
            torch.testing.assert_close(rows[mask], expected[mask], rtol=1e-5, atol=1e-5)
        for number in (1, len(layers) - 1, None):
            places = mask.flatten().nonzero()[:, 0]
            found = TextInput(copy.deepcopy(encoder), number, "setting").eval()(tokens, mask, places)
            torch.testing.assert_close(found[0], states[-1 if number is None else number][mask], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", LANGUAGE_FAMILIES)
def test_language_layers_are_those_of_the_checkpoint(family: str, tmp_path: Path) -> None:
    original = save_language(tmp_path / family, family)
    encoder = language_of(tmp_path / family)
    assert not any("pooler" in name for name, _ in encoder.named_parameters())
    check_language(encoder, original)


def test_sixteen_bit_checkpoints_become_float32(tmp_path: Path) -> None:
    save_language(tmp_path / "half", "bert", half=True)
    assert load_file(tmp_path / "half" / "model.safetensors")["embeddings.LayerNorm.weight"].dtype == torch.float16
    assert {parameter.dtype for parameter in language_of(tmp_path / "half").parameters()} == {torch.float32}


def test_mpnets_bias_is_zero_for_joint_vectors_and_its_own_for_text(tmp_path: Path) -> None:
    original = save_language(tmp_path / "mpnet", "mpnet")
    layer = language_layers(language_of(tmp_path / "mpnet"))[0]
    bias = original.encoder.compute_position_bias(torch.randn(2, 60, 12))[:1]
    for queries in (60, 1):
        with_joint = layer.position_bias(queries, 60, joint=3)
        torch.testing.assert_close(with_joint[..., :60], bias[..., :queries, :])
        assert with_joint.shape[-2:] == (queries, 63)
        assert (with_joint[..., 60:] == 0).all()


def test_a_language_description_rebuilds_the_encoder_without_its_folder(tmp_path: Path) -> None:
    for family in LANGUAGE_FAMILIES:
        save_language(tmp_path / family, family)
        settings = BackboneSettings(weights=str(tmp_path / family))
        encoder, description = language_backbone(settings, SETTING, 0)
        shutil.rmtree(tmp_path / family)
        again, described_again = language_backbone(settings, SETTING, 0, json.loads(json.dumps(description)))
        again.load_state_dict(encoder.state_dict())
        assert described_again == description
        check_language(again.eval(), encoder.eval())


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_dropout_is_the_checkpoints_own_unless_set(family: str, tmp_path: Path) -> None:
    save_language(tmp_path / "own", family, hidden_dropout_prob=0.25, attention_probs_dropout_prob=0.25)
    for asked, expected in ((None, 0.25), (0.0, 0.0), (0.4, 0.4)):
        settings = BackboneSettings(weights=str(tmp_path / "own"), dropout=asked)
        encoder, description = language_backbone(settings, SETTING, 0)
        again, _ = language_backbone(settings, SETTING, 0, json.loads(json.dumps(description)))
        for model in (encoder, again):
            found = {module.p for module in model.modules() if isinstance(module, nn.Dropout)}
            assert found == {expected}


@pytest.mark.parametrize("family", ["t5", "gpt2", "distilbert"])
def test_other_families_are_refused_by_name(family: str, tmp_path: Path) -> None:
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"{SETTING}: a '{family}' encoder cannot serve .*roberta"):
        language_of(tmp_path)


# -------------------------------------------------------------------------------------------------------------- vision


def forward(vit: Any, mel: torch.Tensor) -> torch.Tensor:
    """MelInput, the layers and the final norm, nothing padded."""
    rows, mask = MelInput(vit)(mel, torch.full((len(mel),), mel.shape[1]))
    assert mask.all()
    for layer in vision_layers(vit):
        rows = layer(rows, mask)
    return vit.norm(rows)


@pytest.mark.parametrize("patch", [(8, 8), (16, 4)])
@pytest.mark.parametrize("variant", VITS)
def test_vision_layers_are_those_of_the_checkpoint(variant: str, patch: tuple[int, int], tmp_path: Path) -> None:
    save_vision(tmp_path / "vit", **VIT | VITS[variant])
    frames = 6 * patch[1]
    mel = torch.randn(2, frames, 80)
    reference = timm.create_model(
        f"local-dir:{tmp_path / 'vit'}", pretrained=True, img_size=(80, frames), patch_size=patch
    ).eval()
    with torch.no_grad():
        found = forward(vision_of(tmp_path / "vit", patch, frames), mel)
        expected = reference.forward_features(mel.transpose(1, 2)[:, None].expand(-1, 3, -1, -1))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_patch_kernel_is_summed_over_channels_and_resampled(tmp_path: Path) -> None:
    original = save_vision(tmp_path / "vit", **VIT).patch_embed.proj.weight.detach().sum(dim=1)
    same = vision_of(tmp_path / "vit", (8, 8), 64).patch_embed.proj.weight.detach()[:, 0]
    torch.testing.assert_close(same, original)
    larger = vision_of(tmp_path / "vit", (16, 20), 60).patch_embed.proj.weight.detach()[:, 0]
    # What the kernel of the checkpoint says of a patch, the resampled one says of the enlarged patch.
    patch = torch.randn(1, 1, 8, 8)
    enlarged = nn.functional.interpolate(patch, (16, 20), mode="bicubic", antialias=True)
    torch.testing.assert_close((larger * enlarged[0]).sum((1, 2)), (original * patch[0]).sum((1, 2)), rtol=0, atol=1e-3)


@pytest.mark.parametrize("variant", VITS)
@pytest.mark.parametrize(("patch", "frames"), [((16, 8), 100), ((8, 8), 32), ((40, 8), 64)])
def test_positions_are_resampled_to_frequency_by_time(
    variant: str, patch: tuple[int, int], frames: int, tmp_path: Path
) -> None:
    """(40, 8) with 64 frames has 2 x 8 patches: as many as the checkpoint's 4 x 4, and not in the same places."""
    original = save_vision(tmp_path / "vit", **VIT | VITS[variant])
    with torch.no_grad():
        embed = MelInput(vision_of(tmp_path / "vit", patch, frames))
        columns = -(-frames // patch[1])
        assert embed.grid == (80 // patch[0], columns)
        own = original.pos_embed.shape[1] - 16  # positions of [CLS] and registers
        grid = original.pos_embed[:, own:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
        resampled = nn.functional.interpolate(grid, embed.grid, mode="bicubic", antialias=True)
        torch.testing.assert_close(embed.pos_embed[:, own:], resampled.flatten(2).transpose(1, 2))
        torch.testing.assert_close(embed.pos_embed[:, :own], original.pos_embed[:, :own])
        torch.testing.assert_close(embed.cls_token, original.cls_token)


@pytest.mark.parametrize("variant", VITS)
def test_a_vision_description_rebuilds_the_model_without_its_folder(variant: str, tmp_path: Path) -> None:
    save_vision(tmp_path / "vit", **VIT | VITS[variant])
    settings = VisionSettings(weights=str(tmp_path / "vit"), patch=(16, 8), dropout=0.1)
    vit, description = vision_backbone(settings, 50)
    shutil.rmtree(tmp_path / "vit")
    again, _ = vision_backbone(settings, 50, json.loads(json.dumps(description)))
    again.load_state_dict(vit.state_dict())
    mel = torch.randn(1, 56, 80)
    torch.testing.assert_close(forward(again.eval(), mel), forward(vit.eval(), mel))


@pytest.mark.parametrize(
    ("architecture", "kind", "arguments"),
    [
        ("resnet18", "resnet18", {}),
        ("swin_tiny_patch4_window7_224", "SwinTransformer", {"embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2)}),
        ("deit_tiny_distilled_patch16_224", "VisionTransformerDistilled", VIT),
        ("vit_tiny_patch16_224", "VisionTransformer", VIT | {"class_token": False, "global_pool": "avg"}),
    ],
)
def test_other_vision_models_are_refused_by_name(
    architecture: str, kind: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / architecture
    save_vision(folder, architecture, **arguments)
    with pytest.raises(UserError, match=r"model\.vision\.weights: .*cannot serve; choose a model of timm's") as caught:
        vision_of(folder, (16, 16), 100)
    assert kind in str(caught.value)


# ----------------------------------------------------------------------------------- weights that cannot be had


def damage(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    match how:
        case "no folder":
            shutil.rmtree(folder)
        case "an empty folder":
            shutil.rmtree(folder)
            folder.mkdir()
        case "no weights":
            weights.unlink()
        case "half the weights' bytes":
            weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
        case "a layer is missing":
            kept = {name: tensor for name, tensor in load_file(weights).items() if f".{LAYERS - 1}." not in name}
            save_file(kept, weights, metadata={"format": "pt"})
        case "another shape":
            changed = load_file(weights)
            name = next(name for name in changed if name.endswith(("output.dense.weight", "mlp.fc2.weight")))
            save_file(changed | {name: changed[name][:, :-2].contiguous()}, weights, metadata={"format": "pt"})
        case "half a description":
            (folder / "config.json").write_text('{"model_type": "be')


@pytest.mark.parametrize(
    "how",
    [
        "no folder",
        "an empty folder",
        "no weights",
        "half the weights' bytes",
        "a layer is missing",
        "another shape",
        "half a description",
    ],
)
@pytest.mark.parametrize("kind", ["language", "vision"])
def test_weights_that_are_not_whole_are_one_clear_error_and_never_random(kind: str, how: str, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    if kind == "language":
        save_language(folder, "bert")
    else:
        save_vision(folder, **VIT)
    damage(folder, how)
    with pytest.raises(UserError) as caught:
        language_of(folder) if kind == "language" else vision_of(folder, (16, 16), 100)
    message = str(caught.value)
    assert message.startswith(f"model.{kind}.weights: ")
    assert str(folder) in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["bert-base-uncased", "some-group/some-model"])
def test_a_hub_name_that_cannot_be_reached_is_one_clear_error_with_two_ways_out(name: str) -> None:
    settings = BackboneSettings(weights=name)
    for read in (
        lambda: language_backbone(settings, SETTING, 0),
        lambda: pretrained_tokenizer(settings, SETTING),
        lambda: vision_of("vit_small_patch14_dinov2.lvd142m" if "/" not in name else name, (16, 16), 100),
    ):
        with pytest.raises(UserError, match=r"cannot be had here .*name their folder, or set .*\.scratch") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_the_tokenizer_of_a_checkpoint_is_its_own(uneven_corpus: Corpus, tmp_path: Path) -> None:
    trained = train_tokenizer(uneven_corpus.split("train"), 290)
    trained.save_pretrained(tmp_path)
    AutoConfig.for_model("roberta").save_pretrained(tmp_path)
    found = pretrained_tokenizer(BackboneSettings(weights=str(tmp_path)), SETTING)
    text = "Well, nobody came to Ümläut-town."
    assert found(text)["input_ids"] == trained(text)["input_ids"]
    assert found.pad_token_id == trained.pad_token_id == 1


# ------------------------------------------------------------------------------------------------------- a whole model


def pretrained_settings(folder: Path, **changes: Any) -> ModelSettings:
    tree = merged(
        {
            "text_encoder": {"weights": str(folder / "text"), "hidden_state": 2},
            "extractor": {"layers": 1, "heads": 2, "width": 16},
            "language": {"weights": str(folder / "language")},
            "vision": {"weights": str(folder / "vision"), "patch": [16, 16]},
            "blocks": 1,
        },
        {key.replace("__", "."): value for key, value in changes.items()},
    )
    return ModelSettings.model_validate(tree)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    save_language(folder / "text", "roberta")
    save_language(folder / "language", "mpnet")
    save_vision(folder / "vision", **VIT | VITS["registers"])
    return folder


@pytest.mark.parametrize(
    ("stem", "which", "stem_layers", "fused"),
    [(0, "first", [], [0]), (2, "first", [0, 1], [2]), (1, "last", [0], [2]), (0, "last", [], [2])],
)
def test_stem_and_fused_layers_are_the_ones_asked_for(
    stem: int, which: str, stem_layers: list[int], fused: list[int], checkpoints: Path
) -> None:
    changes = {
        f"{kind}__{key}": v for kind in ("language", "vision") for key, v in (("stem_layers", stem), ("layers", which))
    }
    network = Network(pretrained_settings(checkpoints, **changes), 2, 48, MAX_SECONDS)
    for kind, name, own in (
        ("language", "encoder.layer.{}.output.dense.weight", "mlp.2.weight"),
        ("vision", "blocks.{}.mlp.fc1.weight", "mlp.0.fc1.weight"),
    ):
        saved = load_file(checkpoints / kind / "model.safetensors")

        def number(layer: nn.Module, own: str = own, name: str = name, saved: dict[str, Any] = saved) -> int:
            weight = layer.get_parameter(own)
            return next(n for n in range(LAYERS) if torch.equal(saved[name.format(n)], weight))

        assert [number(layer) for layer in getattr(network, f"{kind}_stem")] == stem_layers
        assert [number(getattr(block, kind)) for block in network.blocks] == fused


def test_an_exported_model_needs_neither_the_folders_nor_the_hub(
    checkpoints: Path, uneven_corpus: Corpus, tmp_path: Path
) -> None:
    settings = pretrained_settings(checkpoints, vision__stem_layers=1)
    network = Network(settings, len(LABELS), 48, MAX_SECONDS).eval()
    data = {"max_seconds": MAX_SECONDS, "max_tokens": 48}
    tree = {"data": data, "model": settings.model_dump(mode="json"), "train": {"steps": 1}}
    tokenizer = train_tokenizer(uneven_corpus.split("train"), 290)
    config = validate(tree, "test")
    save_model(tmp_path / "best", network.state_dict(), network, config, list(LABELS), (0.0, 1.0), tokenizer, {})
    shutil.rmtree(checkpoints)
    loaded = load_model(tmp_path / "best")
    batch = make_batch(tokens=[5, 20, 0], frames=[600, 3, 90])
    with torch.no_grad():
        for found, expected in zip(loaded.network(batch), network(batch), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------ two real checkpoints


@pytest.mark.required
def test_minilm_is_minilm(shared: Path) -> None:
    folder = shared / "models" / "minilm"
    original = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    check_language(language_of(folder), original)
    tokenizer = pretrained_tokenizer(BackboneSettings(weights=str(folder)), SETTING)
    assert tokenizer("You did what?")["input_ids"] == [101, 2017, 2106, 2054, 1029, 102]


@pytest.mark.required
def test_dinov2_is_dinov2(shared: Path, tmp_path: Path) -> None:
    original = shared / "models" / "dinov2-small"
    # In float32: timm sums and resamples kernels in the precision of the file.
    folder = tmp_path / "dinov2"
    folder.mkdir()
    shutil.copyfile(original / "config.json", folder / "config.json")
    weights = {name: tensor.float() for name, tensor in load_file(original / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors")
    mel = torch.randn(1, 64, 80)
    reference = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=(80, 64), patch_size=16).eval()
    with torch.no_grad():
        vit = vision_of(folder, (16, 16), 64)
        expected = reference.forward_features(mel.transpose(1, 2)[:, None].expand(-1, 3, -1, -1))
        largest = float(expected.abs().max())
        torch.testing.assert_close(forward(vit, mel), expected, rtol=0, atol=1e-5 * largest)
        half = vision_of(original, (16, 16), 64)
        torch.testing.assert_close(forward(half, mel), expected, rtol=0, atol=1e-3 * largest)
    assert len(vit.blocks) == 12
    torch.testing.assert_close(half.blocks[7].ls1.gamma.detach(), weights["blocks.7.ls1.gamma"], rtol=0, atol=0)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float32}
