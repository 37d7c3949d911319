"""Settings: what is taken, what is refused and in which words."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import merged
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from jointfuse.config import Config, changed_keys, load_config, parse_interval, recipe_names, validate
from jointfuse.data.corpora.descriptions import read_description
from jointfuse.errors import UserError

SMALL = {
    "model": {
        "text_encoder": {"weights": "some/encoder"},
        "language": {"scratch": {"width": 8, "layers": 2, "heads": 2}},
        "vision": {"scratch": {"width": 8, "layers": 2, "heads": 2}},
    },
    "train": {"steps": 5},
}


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(SMALL))  # JSON is YAML
    return str(path)


def refusal(recipe: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(recipe, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ------------------------------------------------------------------------------------------------------- what is taken


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_by_its_name_and_comes_back_from_its_own_yaml(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    assert config.recipe == name
    copy = tmp_path / "config.yaml"
    copy.write_text(config.to_yaml())
    assert load_config(str(copy)) == config


def test_the_recipes_a_user_is_told_of_are_there() -> None:
    assert {"demo", "paper-base", "paper-large", "small"} <= set(recipe_names())


def test_the_two_readings_of_the_paper_say_what_the_paper_says() -> None:
    for name in ("paper-base", "paper-large"):
        config = load_config(name)
        assert (config.train.optimizer, config.train.lr, config.train.batch) == ("adam", 1e-4, 32)
        assert config.train.freeze == ["text_encoder"]
        assert config.model.text_encoder.hidden_state == 12
        extractor = config.model.extractor
        assert (extractor.layers, extractor.heads, extractor.width) == (2, 8, 1024)
        assert (config.model.joint_vectors, config.model.blocks, config.loss.icl_weight) == (4, 2, 1)


def test_overrides_land_in_their_section_with_their_type(recipe: str) -> None:
    config = load_config(
        recipe,
        [
            "train.lr=3e-5",  # which YAML takes for a text
            "train.freeze=[text_encoder, language]",
            "train.part_lr.joint=1e-3",
            "model.joint_vectors=0",
            "model.vision.patch=[8, 4]",
            "loss.train_temperature=true",
            "data.corpus=some/where=else",
            "train.patience=",
        ],
    )
    assert config.train.lr == 3e-5
    assert config.train.freeze == ["text_encoder", "language"]
    assert config.train.part_lr == {"joint": 1e-3}
    assert config.model.joint_vectors == 0
    assert config.model.vision.patch == (8, 4)
    assert config.loss.train_temperature is True
    assert config.data.corpus == "some/where=else"
    assert config.train.patience is None


def test_naming_the_other_source_of_a_backbone_replaces_the_first(recipe: str) -> None:
    text = load_config(recipe, ["model.text_encoder.scratch={width: 8, layers: 1, heads: 2}"]).model.text_encoder
    assert text.weights is None
    assert text.scratch is not None
    vision = load_config(recipe, ["model.vision.weights=vit"]).model.vision
    assert (vision.weights, vision.scratch) == ("vit", None)
    language = load_config(recipe, ["model.language.scratch.layers=7"]).model.language
    assert language.scratch is not None
    assert (language.scratch.layers, language.scratch.width) == (7, 8)


def test_naming_the_other_length_of_a_run_replaces_the_first(recipe: str) -> None:
    train = load_config(recipe, ["train.epochs=3"]).train
    assert (train.epochs, train.steps) == (3, None)


@pytest.mark.parametrize(
    ("text", "interval"), [("1 epoch", (1, "epoch")), ("200 steps", (200, "step")), (" 3  epochs ", (3, "epoch"))]
)
def test_an_interval_is_a_number_and_a_unit(text: str, interval: tuple[int, str]) -> None:
    assert parse_interval(text) == interval


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.learning_rate=1", ["unknown setting 'train.learning_rate'"]),
        ("train.epoch=3", ["unknown setting 'train.epoch'", "did you mean 'train.epochs'?"]),
        ("modle.blocks=3", ["unknown setting 'modle'", "did you mean 'model'?"]),
        ("model.joint_vector=3", ["did you mean 'model.joint_vectors'?"]),
        ("model.vision.scratch.withd=3", ["did you mean 'model.vision.scratch.width'?", "layers"]),
        ("model.vision.blocks=3", ["unknown setting 'model.vision.blocks'", "known here: weights, scratch"]),
    ],
)
def test_an_unknown_key_is_refused_with_its_nearest_neighbour(override: str, expected: list[str], recipe: str) -> None:
    message = refusal(recipe, override)
    assert message.startswith(f"override '{override}': unknown setting ")
    for part in expected:
        assert part in message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.lr=fast"], ["train.lr = 'fast'", "number"]),
        (["train.lr=0"], ["train.lr = 0", "greater than 0"]),
        (["train.lr=.inf"], ["train.lr = inf", "finite"]),
        (["train.batch=2.5"], ["train.batch = 2.5", "integer"]),
        (["train.decay=sudden"], ["train.decay = 'sudden'", "'linear', 'cosine' or 'constant'"]),
        (["train.evaluate_every=often"], ["train.evaluate_every = 'often'", "'200 steps'"]),
        (["train.save_every=0 steps"], ["train.save_every = '0 steps'", "'1 epoch'"]),
        (["train.freeze=[legs]"], ["train.freeze", "'legs'", "'text_encoder'"]),
        (["train.part_lr.legs=1"], ["train.part_lr", "'legs'", "'joint'"]),
        (["loss.temperature=0"], ["loss.temperature = 0", "greater than 0"]),
        (["loss.temperature=-0.5"], ["loss.temperature = -0.5", "greater than 0"]),
        (["loss.temperature=.nan"], ["loss.temperature = nan", "finite"]),
        (["loss.icl_weight=-1"], ["loss.icl_weight = -1", "greater than or equal to 0"]),
        (["loss.icl_weight=.nan"], ["loss.icl_weight = nan"]),
        (["model.dropout=1"], ["model.dropout = 1", "less than 1"]),
        (["model.modality=smell"], ["model.modality = 'smell'", "'both', 'text' or 'audio'"]),
        (["model.vision.patch=[7, 16]"], ["model.vision.patch = [7, 16]", "divide the 80 mel bins"]),
        (["model.vision.patch=16"], ["model.vision.patch = 16"]),
        (["data.max_seconds=121"], ["data.max_seconds = 121", "120"]),
        (["data.max_tokens=3"], ["data.max_tokens = 3", "4"]),
        (["train=3"], ["train = 3"]),
    ],
)
def test_a_wrong_value_is_refused_with_key_value_and_what_is_allowed(
    overrides: list[str], expected: list[str], recipe: str
) -> None:
    # The recipe is not to blame, nor are overrides that are right.
    message = refusal(recipe, "train.seed=1", *overrides, "data.workers=0")
    assert message.startswith(f"override '{overrides[0]}': {expected[0]}")
    for part in expected:
        assert part in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.extractor.heads=3", "model.extractor: width 1024 must be a multiple of heads 3"),
        ("model.vision.scratch.heads=3", "model.vision.scratch: width 8 must be a multiple of heads 3"),
        ("train.micro_batch=5", "settings: train.micro_batch 5 does not divide train.batch 32"),
        ("model.text_encoder.weights=", "model.text_encoder: give either weights"),
        ("train.steps=", "train: give either epochs or steps"),
    ],
)
def test_an_override_that_does_not_go_with_the_recipe_is_named_with_it(
    override: str, expected: str, recipe: str
) -> None:
    message = refusal(recipe, "train.seed=1", override)
    assert message.startswith(f"override '{override}' does not go with {recipe}: {expected}")


def test_overrides_that_do_not_go_with_each_other_are_both_named(recipe: str) -> None:
    message = refusal(recipe, "train.batch=9", "train.seed=1", "train.micro_batch=6")
    assert message == (
        "overrides 'train.batch=9' and 'train.micro_batch=6': settings: train.micro_batch 6 does not divide "
        "train.batch 9"
    )


def test_a_mistake_of_the_recipe_is_not_an_overrides(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(SMALL | {"train": {"steps": 5, "lr": "fast"}}))
    assert refusal(str(path), "train.seed=1").startswith(f"{path}: train.lr = 'fast': ")
    assert refusal(str(path), "train.lr=slow").startswith("override 'train.lr=slow': train.lr = 'slow': ")
    assert load_config(str(path), ["train.lr=1e-3"]).train.lr == 1e-3


def test_two_sources_of_a_backbone_and_two_lengths_of_a_run_are_refused() -> None:
    both = {"weights": "vit", "scratch": {"width": 8, "layers": 2, "heads": 2}}
    with pytest.raises(UserError, match=r"here: model\.vision: give either weights"):
        validate(SMALL | {"model": SMALL["model"] | {"vision": both}}, "here")
    with pytest.raises(UserError, match="here: train: give either epochs or steps"):
        validate(SMALL | {"train": {"steps": 5, "epochs": 1}}, "here")


@pytest.mark.parametrize("override", ["train.lr", "=3", "train.lr=[1"])
def test_an_override_of_another_shape_is_refused(override: str, recipe: str) -> None:
    assert f"override '{override}'" in refusal(recipe, override)


def test_an_override_inside_a_value_is_refused(recipe: str) -> None:
    assert "'weights' is a value, not a section" in refusal(recipe, "model.text_encoder.weights.name=3")


def test_an_unknown_recipe_is_refused_with_the_names_there_are() -> None:
    message = refusal("paper-bas")
    assert "did you mean 'paper-base'?" in message
    for name in recipe_names():
        assert name in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"train: [1, 2", "not valid YAML"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"- train\n- model\n", "holds list in place of named entries"),
        (b"", "holds NoneType in place of named entries"),
        (b"!!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_a_file_that_holds_no_settings_is_refused_by_name(content: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    path.write_bytes(content)
    message = refusal(str(path))
    assert str(path) in message
    assert expected in message


def test_a_recipe_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    message = refusal(str(tmp_path / "none.yaml"))
    assert "none.yaml" in message
    assert "cannot be read" in message


# ------------------------------------------------------------------------------------------------ what has changed

VALUES: dict[str, st.SearchStrategy[Any]] = {
    "data.corpus": st.text(max_size=5),
    "data.max_seconds": st.floats(0.5, 120),
    "model.blocks": st.integers(1, 9),
    "model.routing": st.sampled_from(["modality", "literal"]),
    "model.text_encoder.hidden_state": st.none() | st.integers(1, 12),
    "model.vision.scratch.width": st.integers(1, 9).map(lambda n: 2 * n),
    "model.vision.patch": st.sampled_from([[16, 16], [8, 4], [80, 1]]),
    "loss.temperature": st.floats(1e-3, 10),
    "train.freeze": st.lists(st.sampled_from(["heads", "joint", "vision"]), unique=True),
    "train.part_lr": st.dictionaries(st.sampled_from(["heads", "joint"]), st.floats(1e-6, 1), max_size=2),
    "train.micro_batch": st.none() | st.sampled_from([1, 4, 32]),
    "train.save_every": st.sampled_from(["1 epoch", "20 steps"]),
}
settings_drawn = st.fixed_dictionaries(VALUES)


def config_of(values: dict[str, Any]) -> Config:
    return validate(merged(SMALL, values), "here")


@given(settings_drawn)
def test_settings_come_back_from_yaml_as_they_were(values: dict[str, Any]) -> None:
    config = config_of(values)
    assert validate(yaml.safe_load(config.to_yaml()), "copy") == config


@given(settings_drawn, settings_drawn)
def test_changed_keys_are_exactly_the_keys_whose_values_differ(old: dict[str, Any], new: dict[str, Any]) -> None:
    found = changed_keys(config_of(old), config_of(new))
    found_by_drawn_key = {next(key for key in VALUES if name == key or name.startswith(f"{key}.")) for name in found}
    assert found_by_drawn_key == {key for key in VALUES if old[key] != new[key]}
    for key in found.keys() & VALUES.keys() - {"train.part_lr"}:
        assert found[key] == (old[key], new[key])
    assert not changed_keys(config_of(new), config_of(new))


# -------------------------------------------------------------------------------------------------- how many there are


def leaves(model: type[BaseModel]) -> list[str]:
    from jointfuse.faults import model_in

    names = []
    for name, field in model.model_fields.items():
        inner = model_in(field.annotation)
        names += [f"{name}.{leaf}" for leaf in leaves(inner)] if inner else [name]
    return names


def test_a_new_setting_is_a_decision() -> None:
    """Every setting is a choice a user has to read about. Raise this number knowingly, or better lower it."""
    assert len(leaves(Config)) == 96


def test_a_key_that_is_given_twice_is_refused_wherever_it_stands(recipe: str, tmp_path: Path) -> None:
    twice = tmp_path / "twice.yaml"
    twice.write_text("train: {steps: 5, lr: 0.1, lr: 0.2}\n")
    assert "'lr' is given twice" in refusal(str(twice))
    twice.write_text("train: {steps: 5}\nmodel: {}\ntrain: {steps: 7}\n")
    assert "'train' is given twice" in refusal(str(twice))
    assert "'fear' is given twice" in refusal(recipe, "data.labels={fear: joy, fear: null}")
    twice.write_text("pattern: x\nsplits: {train: [a], train: [b]}\n")
    with pytest.raises(UserError, match="'train' is given twice"):
        read_description(twice)
