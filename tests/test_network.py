"""The whole model: the stack, padding, missing modalities, what trains, what is recomputed, what is exported."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import literal
import numpy as np
import pytest
import torch
from helpers import (
    LABELS,
    MAX_SECONDS,
    SAME_WIDTH,
    SIZES,
    build_corpus,
    gradients,
    make_batch,
    make_network,
    model_settings,
    read,
    reader_of,
    saved_bytes,
)
from torch.utils._python_dispatch import TorchDispatchMode

from jointfuse.config import Config, LossSettings, ModelSettings, Part, validate
from jointfuse.data.batch import Batch
from jointfuse.data.shards import Corpus
from jointfuse.errors import UserError
from jointfuse.model.export import initialise, load_model, save_model
from jointfuse.model.network import Network, part_of
from jointfuse.train.objective import Objective

T_HEADS, M_HEADS = 3, 2
EVERYTHING_BUT_PROMPTS = [part for part in get_args(Part) if part not in ("joint", "heads")]


def settings_of(routing: str = "modality", **changes: Any) -> ModelSettings:
    widths = {key.replace(".", "__"): value for key, value in SAME_WIDTH.items()} if routing == "literal" else {}
    return model_settings(routing=routing, **widths, **changes)


def some_batch() -> Batch:
    return make_batch(tokens=[7, 2, 1, 12], frames=[120, 16, 333, 1], labels=[0, 1, 0, 1])


def score(logits: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """A number in which every entry counts."""
    generator = torch.Generator().manual_seed(4)
    return sum((x * torch.randn(x.shape, generator=generator)).sum() for x in (logits, features))  # type: ignore[return-value]


# ----------------------------------------------------------------------------------------------------------- the stack


@pytest.mark.parametrize("routing", ["modality", "literal"])
@pytest.mark.parametrize("joint_vectors", [0, 1, 4, 32])
@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 5])
def test_the_stack_and_every_gradient_are_the_equations(routing: str, joint_vectors: int, blocks: int) -> None:
    deep = {"language__scratch__layers": blocks, "vision__scratch__layers": blocks}
    network = make_network(settings_of(routing, joint_vectors=joint_vectors, blocks=blocks, **deep)).double().eval()
    batch = some_batch()
    logits, features = network(batch)
    score(logits, features).backward()
    found = gradients(network)
    network.zero_grad()

    assert network.extractor is not None
    t = network.text_encoder.embeddings(input_ids=batch.tokens)
    for layer in network.text_encoder.layers:
        t = literal.bert_layer(layer, t, batch.token_mask, heads=2)
    t = network.extractor.enter(t)
    for layer in network.extractor.layers:
        t = literal.bert_layer(layer, t, batch.token_mask, heads=2)
    t = network.extractor.leave(t)
    m, m_mask = network.vision_embed(batch.mel, batch.frames)
    expected = literal.fused(network, t, batch.token_mask, m, m_mask, T_HEADS, M_HEADS)
    torch.testing.assert_close(logits.double(), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(features.double(), expected[1], rtol=1e-5, atol=1e-6)
    score(*expected).backward()
    wanted = gradients(network)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-5, atol=1e-6 * largest + 1e-9, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_without_joint_vectors_the_two_streams_are_independent() -> None:
    network = make_network(settings_of(joint_vectors=0)).eval()
    batch = some_batch()
    width = network.text_head.in_features  # type: ignore[union-attr]
    _, features = network(batch)
    _, other = network(replace(batch, mel=torch.randn_like(batch.mel)))
    torch.testing.assert_close(other[:, :width], features[:, :width], rtol=0, atol=1e-6)
    assert not torch.allclose(other[:, width:], features[:, width:], atol=1e-3)
    _, other = network(replace(batch, tokens=batch.tokens.flip(0)))
    torch.testing.assert_close(other[:, width:], features[:, width:], rtol=0, atol=1e-6)
    assert not torch.allclose(other[:, :width], features[:, :width], atol=1e-3)


def test_literal_routing_sends_what_ltrans_gave_out_into_vtrans() -> None:
    network = make_network(settings_of("literal", joint_vectors=0, blocks=2)).eval()
    batch = some_batch()
    width = network.text_head.in_features  # type: ignore[union-attr]
    _, features = network(batch)
    # Without joint vectors, two blocks and crossed streams, the half that VTrans leaves is a function of the text.
    _, other = network(replace(batch, mel=torch.randn_like(batch.mel)))
    torch.testing.assert_close(other[:, width:], features[:, width:], rtol=0, atol=1e-6)
    assert not torch.allclose(other[:, :width], features[:, :width], atol=1e-3)


def test_literal_routing_needs_one_width() -> None:
    with pytest.raises(UserError, match=r"model.routing = literal needs .* one width; they are 24 and 16"):
        make_network(model_settings(routing="literal"))


def test_every_block_has_joint_vectors_of_its_own() -> None:
    network = Network(model_settings(joint_vectors=3), len(LABELS), 48, MAX_SECONDS, tokenizer_size=50)
    vectors = [row for block in network.blocks for row in block.v]  # type: ignore[union-attr, operator]
    assert len(vectors) == 6
    for number, row in enumerate(vectors):
        assert row.std() > 0
        assert not any(torch.equal(row, other) for other in vectors[:number])


def test_more_layers_than_the_checkpoint_has_are_refused() -> None:
    with pytest.raises(UserError, match=r"model.vision: 3 stem_layers and 2 blocks need 5 layers, it has 4"):
        make_network(model_settings(vision__stem_layers=3))
    with pytest.raises(UserError, match=r"model.language: 0 stem_layers and 5 blocks need 5 layers, it has 4"):
        make_network(model_settings(blocks=5))
    with pytest.raises(UserError, match=r"model.text_encoder.hidden_state = 3: the encoder has 2 layers"):
        make_network(model_settings(text_encoder__hidden_state=3))


def test_a_missing_extractor_needs_equal_widths() -> None:
    with pytest.raises(UserError, match=r"model.extractor.layers = 0 .* 20 and 24"):
        make_network(model_settings(extractor__layers=0))
    network = make_network(model_settings(extractor__layers=0, text_encoder__scratch__width=24))
    assert network.extractor is None
    assert network(some_batch())[0].shape == (4, len(LABELS))


# ------------------------------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize(
    ("modality", "changes"),
    [
        ("both", {}),
        ("both", {"vision__patch": [8, 6], "vision__stem_layers": 1, "language__stem_layers": 1}),
        ("both", {"routing": "literal"}),
        ("text", {}),
        ("audio", {"vision__patch": [40, 7]}),
    ],
)
def test_an_utterance_is_judged_the_same_alone_and_in_any_company(
    modality: str, changes: dict[str, Any], uneven_corpus: Corpus
) -> None:
    reader = reader_of(uneven_corpus, modality)
    network = make_network(settings_of(changes.pop("routing", "modality"), modality=modality, **changes)).eval()
    order = np.random.default_rng(0).permutation(SIZES["train"])
    assert {0, 1} < set(order), "the clips of 0.2 and of 6 seconds"

    def judge(ids: np.ndarray) -> torch.Tensor:
        with torch.no_grad():
            logits, features = network(read(reader, ids))
        return torch.cat([logits, features], dim=1)

    alone = torch.cat([judge(np.array([id])) for id in order])
    assert alone.std(dim=0).min() > 1e-3, "utterances must differ"
    for size in (2, 5, SIZES["train"]):
        together = torch.cat([judge(order[start : start + size]) for start in range(0, len(order), size)])
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_the_position_of_a_clip_never_moves() -> None:
    network = make_network(model_settings(modality="audio", vision__patch=[16, 16])).eval()
    embed = network.vision_embed
    short = torch.randn(1, 40, 80)
    rows, mask = embed(short, torch.tensor([40]))
    longer = torch.cat([short, torch.zeros(1, 500, 80)], dim=1)
    long_rows, long_mask = embed(longer, torch.tensor([40]))
    assert mask.sum() == long_mask.sum() == 1 + 5 * 3  # [CLS] and 5 x ceil(40 / 16) patches
    torch.testing.assert_close(long_rows[long_mask], rows[mask])
    # With equal sound everywhere, only position tells patches apart: it must, and every column must have its own.
    still, _ = embed(torch.zeros(1, 601, 80), torch.tensor([601]))
    grid = still[0, 1:].unflatten(0, embed.grid)
    assert embed.grid == (5, 38)
    assert torch.pdist(grid.flatten(0, 1)).min() > 1e-3


@pytest.mark.parametrize("max_seconds", [0.01, 0.0151, 0.33333, 1.005, 2.0, 6.0])
@pytest.mark.parametrize("patch", [[80, 1], [16, 16], [8, 7]])
def test_the_grid_holds_the_longest_clip_there_can_be(max_seconds: float, patch: list[int]) -> None:
    samples = round(max_seconds * 16_000)  # as the reader cuts
    frames = 1 + samples // 160
    settings = model_settings(modality="audio", vision__patch=patch)
    network = Network(settings, 2, 48, max_seconds).eval()
    rows, mask = network.vision_embed(torch.randn(1, frames, 80), torch.tensor([frames]))
    assert rows.shape[1] == 1 + 80 // patch[0] * -(-frames // patch[1])
    assert mask.all()


# ------------------------------------------------------------------------------------------------- missing modalities


def ids_of(corpus: Corpus, lacking: str) -> tuple[list[int], list[int]]:
    """(utterances that lack it, utterances that lack nothing)"""
    index = corpus.split("train").index
    text, clip = index["characters"] > 0, index["duration_ms"] > 0
    lacks = ~text if lacking == "text" else ~clip
    return np.flatnonzero(lacks).tolist(), np.flatnonzero(text & clip).tolist()


@pytest.mark.parametrize("lacking", ["text", "clip"])
@pytest.mark.parametrize("routing", ["modality", "literal"])
def test_an_utterance_of_one_modality_is_judged_by_that_head_whatever_the_others_are(
    lacking: str, routing: str, gapped_corpus: Corpus
) -> None:
    reader = reader_of(gapped_corpus, "both", missing_modality="allow")
    network = make_network(settings_of(routing, blocks=3)).eval()
    lacks, whole = ids_of(gapped_corpus, lacking)
    assert len(lacks) > 2

    def judge(ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            return network(read(reader, ids))

    width = network.text_head.in_features  # type: ignore[union-attr]
    own, missing = (slice(width, None), slice(width)) if lacking == "text" else (slice(width), slice(width, None))
    head = network.audio_head if lacking == "text" else network.text_head
    if routing == "literal":
        # After three crossed blocks each stream is back in the transformer it started from.
        assert network.settings.blocks % 2
    for id in lacks:
        alone = judge([id])
        for company in (whole[:1], whole[:5] + lacks, lacks, whole[-2:]):
            logits, features = judge([*company, id])
            torch.testing.assert_close(logits[-1:], alone[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(features[-1:], alone[1], rtol=0, atol=1e-5)
        logits, features = alone
        assert (features[:, missing] == 0).all()
        assert (features[:, own] != 0).any()
        assert head is not None
        torch.testing.assert_close(logits, head(features[:, own]))


def test_the_literal_route_finds_the_lacking_stream_where_it_ends() -> None:
    network = make_network(settings_of("literal", blocks=2)).eval()
    width = network.text_head.in_features  # type: ignore[union-attr]
    logits, features = network(make_batch([5, 6], [50, 0]))
    # After two blocks the text leaves VTrans.
    assert (features[1, :width] == 0).all()
    torch.testing.assert_close(logits[1], network.audio_head(features[1, width:]))  # type: ignore[misc]
    assert (features[0] != 0).all()


@pytest.mark.parametrize("joint_vectors", [0, 4])
def test_lacking_modalities_leave_finite_gradients(joint_vectors: int) -> None:
    network = make_network(model_settings(joint_vectors=joint_vectors, language__stem_layers=1)).train()
    batch = make_batch([9, 0, 0, 3], [0, 40, 70, 0], labels=[0, 0, 1, 1])
    losses = Objective(network, LossSettings(), accumulation=1)(batch, 4)
    losses["loss"].backward()
    assert losses["icl"] > 0
    for name, gradient in gradients(network).items():
        assert gradient.isfinite().all(), name


@pytest.mark.parametrize("lacking", ["text", "clip"])
def test_an_utterance_that_lacks_what_the_settings_demand_is_refused_by_name(lacking: str, tmp_path: Path) -> None:
    corpus = build_corpus(tmp_path / "corpus", gaps=(lacking,))
    lacks, _ = ids_of(corpus, lacking)
    with pytest.raises(UserError) as caught:
        reader_of(corpus, "both", missing_modality="error")
    first = corpus.split("train").key(lacks[0])
    assert f"{len(lacks)} utterances have no {lacking} (first: {first})" in str(caught.value)
    assert "data.missing_modality=allow" in str(caught.value)
    reader_of(corpus, "both", missing_modality="allow")
    reader_of(corpus, "audio" if lacking == "text" else "text", missing_modality="error")


@pytest.mark.parametrize("setting", ["error", "allow"])
def test_an_utterance_of_no_modality_is_refused_by_name(setting: str, tmp_path: Path) -> None:
    corpus = build_corpus(tmp_path / "corpus", gaps=("everything",))
    with pytest.raises(UserError, match=corpus.split("train").key(2)):
        reader_of(corpus, "both", missing_modality=setting)


@pytest.mark.parametrize(("modality", "lacking"), [("text", "text"), ("audio", "clip")])
@pytest.mark.parametrize("setting", ["error", "allow"])
def test_a_model_of_one_modality_refuses_utterances_without_it(
    modality: str, lacking: str, setting: str, gapped_corpus: Corpus
) -> None:
    lacks, _ = ids_of(gapped_corpus, lacking)
    with pytest.raises(UserError) as caught:
        reader_of(gapped_corpus, modality, missing_modality=setting)
    first = gapped_corpus.split("train").key(lacks[0])
    assert f"{len(lacks)} utterances have no {lacking} (first: {first})" in str(caught.value)
    assert "model.modality=both" in str(caught.value)


# --------------------------------------------------------------------------------------------------------- what trains


def visible(name: str, gradient: torch.Tensor) -> torch.Tensor | None:
    """`gradient` less what is zero by mathematics: softmax does not see what is added to all of its scores."""
    if name.endswith("key.bias"):
        assert gradient.abs().max() < 1e-4
        return None
    if name.endswith("key_value.bias"):
        k, v = gradient.chunk(2)
        assert k.abs().max() < 1e-4
        return v
    return gradient


@pytest.mark.parametrize("train_temperature", [False, True])
@pytest.mark.parametrize("freeze", [[], ["text_encoder"], ["vision_embed", "language_stem", "extractor"], "prompts"])
@pytest.mark.parametrize(
    ("modality", "routing", "joint_vectors"),
    [
        ("both", "modality", 4),
        ("both", "modality", 0),
        ("both", "literal", 4),
        ("both", "literal", 0),
        ("text", "modality", 4),
        ("audio", "modality", 4),
    ],
)
def test_every_trained_parameter_has_a_gradient_and_no_frozen_one(
    modality: str, routing: str, joint_vectors: int, freeze: list[str] | str, train_temperature: bool
) -> None:
    parts = EVERYTHING_BUT_PROMPTS if freeze == "prompts" else freeze
    settings = settings_of(
        routing, modality=modality, joint_vectors=joint_vectors, vision__stem_layers=1, language__stem_layers=1
    )
    network = make_network(settings)
    network.freeze(parts)
    objective = Objective(network, LossSettings(train_temperature=train_temperature), accumulation=1).train()
    objective(some_batch(), 4)["loss"].backward()
    trained = set()
    for part, name, parameter in network.parts():
        if part in parts:
            assert not parameter.requires_grad, name
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
            gradient = visible(name, parameter.grad)
            assert gradient is None or gradient.abs().max() > 0, name
            trained.add(part)
    if freeze == "prompts":
        assert trained == {"heads"} | ({"joint"} if modality == "both" and joint_vectors else set())
    if train_temperature:
        gradient = objective.trained_temperature.grad
        assert gradient is not None
        assert gradient.shape == (1,), "a 0-dim parameter crashes DeepSpeed"
        assert gradient.abs().max() > 0
    else:
        assert [name for name, _ in objective.named_parameters()] == [f"network.{n}" for _, n, _ in network.parts()]


def test_positions_no_clip_reaches_have_no_gradient_and_the_others_do() -> None:
    network = make_network(model_settings(modality="audio"))
    logits, features = network(make_batch([3, 3], [40, 70]))
    score(logits, features).backward()
    gradient = network.vision_embed.pos_embed.grad
    reached = gradient[0, 1:].unflatten(0, (5, 38)).abs().amax(dim=-1) > 0
    assert reached[:, :5].all()  # 70 frames are 5 patches
    assert not reached[:, 5:].any()
    assert gradient[0, 0].abs().max() > 0


def test_every_parameter_belongs_to_a_part_and_every_part_has_parameters() -> None:
    network = make_network(model_settings(vision__stem_layers=1, language__stem_layers=1))
    found = {part for part, _, _ in network.parts()}
    assert found == set(get_args(Part)) - {"temperature"}
    assert part_of("vision_norm.weight", "both") == "vision"
    assert part_of("blocks.1.v", "both") == "joint"
    assert part_of("blocks.1.out.0.weight", "text") == "language"
    assert part_of("blocks.1.mlp.0.fc1.weight", "audio") == "vision"


@pytest.mark.parametrize("icl_weight", [0.0, 0.5])
def test_repeats_that_fill_a_batch_change_neither_losses_nor_gradients(icl_weight: float) -> None:
    filled = make_batch([7, 2, 9, 12], [120, 16, 333, 60], labels=[0, 1, 0, 1])
    filled = replace(filled, valid=torch.tensor([True, True, True, False]))
    real = make_batch([7, 2, 9], [120, 16, 333], labels=[0, 1, 0])
    real = replace(
        real, **{name: getattr(filled, name)[:3, : getattr(real, name).shape[1]] for name in ("tokens", "mel")}
    )
    results = []
    for batch in (filled, real):
        network = make_network(model_settings(extractor__dropout=0.0))
        objective = Objective(network, LossSettings(icl_weight=icl_weight), accumulation=1)
        losses = objective(batch, 3)
        losses["loss"].backward()
        results.append((losses, gradients(objective)))
    (losses, found), (expected_losses, expected) = results
    torch.testing.assert_close(losses, expected_losses)
    torch.testing.assert_close(losses["loss"], losses["erc"] + icl_weight * losses["icl"])
    assert (losses["icl"] > 0) == bool(icl_weight)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_frozen_parts_draw_no_dropout_and_the_others_do() -> None:
    settings = model_settings(vision__dropout=0.3, text_encoder__dropout=0.3)
    network = make_network(settings)
    network.freeze(["text_encoder", "vision_embed"])
    batch = some_batch()

    def encode() -> torch.Tensor:
        return network.text_encoder(batch.tokens, batch.token_mask, batch.token_places)

    network.train()
    torch.testing.assert_close(encode(), encode(), rtol=0, atol=0)
    assert not network.text_encoder.training
    assert not any(module.training for module in network.text_encoder.modules())
    assert network.extractor is not None
    assert network.extractor.training
    assert not torch.equal(network(batch)[0], network(batch)[0])
    network.freeze([])  # what is thawed trains again
    assert not torch.equal(encode(), encode())
    network.eval()
    torch.testing.assert_close(network(batch)[0], network(batch)[0], rtol=0, atol=0)


def test_no_linear_layer_before_the_blocks_sees_a_padded_token() -> None:
    network = make_network(settings_of(language__stem_layers=1)).eval()
    batch = make_batch([7, 2, 0, 12], [120, 16, 33, 50])
    rows: list[int] = []
    assert network.extractor is not None
    for part in (network.text_encoder.layers, network.extractor, network.language_stem):
        for module in part.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(lambda _, given, __: rows.append(given[0].shape[:-1].numel()))
    network(batch)
    assert set(rows) == {7 + 2 + 1 + 12}, "a text that is not there has its [CLS]"


def test_a_frozen_encoder_keeps_nothing_for_a_backward_pass() -> None:
    batch = some_batch()
    network = make_network(model_settings(modality="text"))
    trained = saved_bytes(lambda: network(batch))
    network.freeze(["text_encoder"])
    assert saved_bytes(lambda: network(batch)) < 0.8 * trained


# ------------------------------------------------------------------------------------------------------- recomputation


@pytest.mark.parametrize("modality", ["both", "text", "audio"])
@pytest.mark.parametrize("freeze", [[], ["text_encoder"]])
@pytest.mark.parametrize("mode", ["block", "attention", "layer"])
def test_checkpointing_keeps_fewer_bytes_and_gives_the_same_gradients(
    modality: str, freeze: list[str], mode: str
) -> None:
    batch, results = some_batch(), []
    dropout = {f"{part}__dropout": 0.2 for part in ("text_encoder", "extractor", "language", "vision")}
    settings = settings_of(modality=modality, vision__stem_layers=1, language__stem_layers=1, **dropout)
    for checkpointing in ("none", mode):
        network = make_network(settings, checkpointing=checkpointing)
        network.freeze(freeze)
        network.train()
        objective = Objective(network, LossSettings(train_temperature=True), accumulation=1)
        torch.manual_seed(7)  # dropout is drawn again as it was
        kept = saved_bytes(lambda objective=objective: objective(batch, 4))
        torch.manual_seed(7)
        objective(batch, 4)["loss"].backward()
        results.append((kept, gradients(objective)))
    (plain, expected), (less, found) = results
    assert less < 0.5 * plain
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-8, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize(("mode", "again"), [("none", False), ("attention", False), ("block", True), ("layer", True)])
def test_only_where_it_is_not_kept_is_attention_computed_again(mode: str, again: bool) -> None:
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            computed.add(str(function))
            return function(*args, **(kwargs or {}))

    computed: set[str] = set()
    network = make_network(settings_of(vision__stem_layers=1), checkpointing=mode).train()
    with Names():
        logits, _ = network(some_batch())
        assert any("scaled_dot_product" in name for name in computed)
        computed.clear()
        logits.sum().backward()
    assert any("addmm" in name for name in computed) == (mode != "none"), "the rest of a layer is computed again"
    attended = {name for name in computed if "scaled_dot_product" in name and "backward" not in name}
    assert bool(attended) == again


# -------------------------------------------------------------------------------------------------------------- export


def config_of(settings: ModelSettings) -> Config:
    tree = {
        "data": {"max_seconds": MAX_SECONDS},
        "model": settings.model_dump(mode="json"),
        "train": {"steps": 1},
    }
    return validate(tree, "test")


@pytest.mark.parametrize("modality", ["both", "text", "audio"])
def test_an_exported_model_gives_the_same_logits(modality: str, uneven_corpus: Corpus, tmp_path: Path) -> None:
    reader = reader_of(uneven_corpus, modality, "dev")
    settings = settings_of(modality=modality, text_encoder__hidden_state=1, vision__stem_layers=1)
    network = make_network(settings).eval()
    mel = (uneven_corpus.mel_mean, uneven_corpus.mel_deviation)
    folder = tmp_path / "best"
    for step in (1, 2):  # the second replaces the first
        state = network.state_dict()
        save_model(folder, state, network, config_of(settings), list(LABELS), mel, reader.tokenizer, {"step": step})
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    loaded = load_model(folder)
    assert loaded.labels == list(LABELS)
    assert (loaded.mel_mean, loaded.mel_deviation) == mel
    assert loaded.info == {"step": 2}
    assert loaded.config == config_of(settings)
    assert not loaded.network.training
    other = reader_of(uneven_corpus, modality, "dev")
    if modality != "audio":
        other.tokenizer = loaded.tokenizer
    expected = network(read(reader, range(SIZES["dev"])))
    found = loaded.network(read(other, range(SIZES["dev"])))
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)


def exported(folder: Path, settings: ModelSettings, seed: int = 1) -> Network:
    network = make_network(settings, seed)
    config = config_of(settings)
    save_model(folder, network.state_dict(), network, config, list(LABELS), (0.0, 1.0), None, {})
    return network


def test_a_network_starts_from_an_export(tmp_path: Path) -> None:
    source = exported(tmp_path / "best", model_settings())
    network = make_network(model_settings(), seed=2)
    initialise(network, tmp_path / "best", list(LABELS))
    for name, tensor in source.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize(
    "changes",
    [{"blocks": 1}, {"joint_vectors": 3}, {"modality": "text"}, {"vision__patch": [8, 16]}, {"vision__stem_layers": 1}],
)
def test_an_export_of_other_settings_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    exported(tmp_path / "best", model_settings())
    network = make_network(model_settings(**changes), seed=2)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(UserError, match=r"train.init_from: .*best was exported with other model settings"):
        initialise(network, tmp_path / "best", list(LABELS))
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def spoil(folder: Path, how: str) -> None:
    description, weights = folder / "model.json", folder / "model.safetensors"
    match how:
        case "no description":
            description.unlink()
        case "half a description":
            description.write_text(description.read_text()[:40])
        case "another format":
            description.write_text(json.dumps(json.loads(description.read_text()) | {"format": 99}))
        case "no weights":
            weights.unlink()
        case "half the weights":
            weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("no description", "no exported model here"),
        ("half a description", "Invalid JSON"),
        ("another format", "format 99, this version reads format 1"),
        ("no weights", "missing; copy the folder again or export the model again"),
        ("half the weights", "damaged"),
    ],
)
def test_a_damaged_export_is_one_clear_error(how: str, expected: str, tmp_path: Path) -> None:
    folder = tmp_path / "best"
    exported(folder, model_settings(modality="audio"))
    spoil(folder, how)
    for take in (lambda: load_model(folder), lambda: initialise(make_network(model_settings()), folder, [])):
        with pytest.raises(UserError, match=expected) as caught:
            take()
        assert str(folder) in str(caught.value)


def test_a_text_longer_than_the_encoder_has_positions_for_is_refused_before_any_is_read() -> None:
    settings = model_settings()
    assert Network(settings, 2, 510, 1.0, tokenizer_size=50).reads_text
    with pytest.raises(UserError, match=r"data.max_tokens = 511: the text encoder has positions for 510 tokens"):
        Network(settings, 2, 511, 1.0, tokenizer_size=50)
